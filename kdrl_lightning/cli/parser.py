"""The command line's parser, which reports a mistake in one line instead of two screens."""

from __future__ import annotations

import inspect
import os
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

import kdrl_lightning
from kdrl_lightning.cli.help import HELP_ALL
from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.cli.settings.empty import unknown_group
from kdrl_lightning.cli.settings.layers.overlaid import forget, mistakes, overruled
from kdrl_lightning.cli.settings.private import actions
from kdrl_lightning.cli.settings.renamed import renamed, renamed_flags
from kdrl_lightning.cli.settings.text import Text
from kdrl_lightning.cli.settings.unused import as_written, note, note_repeated
from kdrl_lightning.cli.shipped import with_files
from kdrl_lightning.common.untyped import Value
from kdrl_lightning.errors import ConfigurationError

HELP = "--help`"
# Start of a message about one setting, in jsonargparse's words or in ours.
KEY = re.compile(r"Parser key \"?([\w.+-]+)\"?(?: element \d+)?:|`([\w.+-]+)`(?:: |(?= must ))")

# jsonargparse's messages -> ours.
REWORDED = {
    r"- Expected a path but .* either not accessible or invalid - ": "",
    r"Subclass types expect one of: .*": "Name a class, or give `class_path`.",
    r"Type typing\.Callable\[.*?\] expects a function or a callable class: ": "",
    r"(has no attribute '\w+')\. Got value: .*": r"\1",
    r"Problem with given class_path '[\w.]+': (?=must )": "",
    r"(Correct the module\.) Got value: .*": r"\1",
    r"Expected an? <class '(?:collections\.abc\.Sequence|list)'>\. Got value: (.*)": (
        r"must be a list: got \1. Put it into brackets."
    ),
    r"Expected an? typing\.Literal\[(.*?)\]\. Got value: (.*)": r"must be one of \1: got \2.",
    r"Expected an instantiatable class, but [\w.]*?(\w+) is abstract": (
        r"must name a class of type \1: got arguments without `class_path`."
    ),
    r"Subclasses are disabled for (\w+), thus '([\w.]+)' is not accepted.*\]\)\.": (
        r"must be settings of an \1, such as `prompts`: got \2. Put it under its setting."
    ),
    r"must be a EvalSet, by name or import path: got ([\w.]+)(?:; did you mean \w+\?)?": (
        r"must be settings of an EvalSet, such as `prompts`: got \1. Put it under its setting."
    ),
    r"Not a valid subclass of EvalSet\. Got value: (.*) Name a class, .*": (
        r"must be settings of an EvalSet, such as `prompts`: got \1. Put it under its setting."
    ),
}
WRONG_TYPE = re.compile(r"Expected an? <class '(str|int|float|bool)'>\. Got value: (.*)")
WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}


class OneLineParser(LightningArgumentParser):
    """Reports a mistake in one line, with the nearest known name if a name is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a one-line error; with ``JSONARGPARSE_DEBUG`` set, fail as jsonargparse does.

        Raises:
            ConfigurationError: always, without ``JSONARGPARSE_DEBUG``.
        """
        if os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        text = as_written(one_line(message))
        if HELP not in text:
            text += self._suggestion(text) + self._help(text)
        raise ConfigurationError(text) from ex

    # `Any` below: jsonargparse's private methods have no types.
    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a configuration file.

        Raises:
            ConfigurationError: it is not UTF-8 text.
        """
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"`config` must be UTF-8: got {path} ({error}). Save it as UTF-8."
            ) from error

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the command line; ``--config`` takes a file or a configuration of the library.

        Raises:
            ConfigurationError: a setting is wrong, or a file of settings is not UTF-8 text.
        """
        words = next(iter(args), kwargs.pop("args", None))
        given = renamed_flags(sys.argv[1:] if words is None else list(words))
        note_repeated(given)
        # `--help` is our short screen; argparse's `--help` lists every flag.
        words = ["--help" if word == HELP_ALL else word for word in with_files(given)]
        for flag, file in overruled(words, _settings_of):
            note(f"`{flag}` has no effect: --config {file} follows it and sets it. Put it last.")
        if not self._of_a_class:
            forget()
        try:
            return super().parse_args(words, *args[1:], **kwargs)
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"a file of settings must be UTF-8: got {error}. Save it as UTF-8."
            ) from error

    def _apply_actions(self, cfg: Any, parent_key: str = "", *args: Any, **kwargs: Any) -> Any:
        # jsonargparse calls this for all settings that it reads from files, texts and groups.
        if type(cfg) is dict and not self._of_a_class:
            if parent_key == "data":
                cfg = renamed({"data": cfg}, "`data`")["data"]
            elif not parent_key:
                cfg = renamed(cfg, "a configuration")
        self._refuse_unknown_group({parent_key: cfg} if parent_key else cfg)
        if type(cfg) is dict and not parent_key and not self._of_a_class:
            for file, error in mistakes(self._actions):
                words = one_line(str(error)).rstrip(".")
                note(f"{words}. This is in {file}, and a later file replaces it.")
        return super()._apply_actions(cfg, parent_key, *args, **kwargs)

    def _refuse_unknown_group(self, cfg: Any) -> None:
        if any(isinstance(action.choices, dict) for action in self._actions):
            return  # the parsers of the subcommands check it
        settings = {action.dest for action in self._actions}
        groups = {a.dest for a in self._actions if isinstance(a, actions._ActionConfigLoad)}
        unknown = unknown_group(settings, groups, cfg)
        if unknown:
            self.error(f"Option '{unknown}' is not accepted")

    def _help(self, text: str) -> str:
        prog = self.prog.split(" [")[0].removesuffix(" fit")
        if not prog.startswith("python -m"):  # a parser that jsonargparse makes for one class
            prog = "python -m kdrl_lightning"
        alone = prog.endswith(("export", "evaluate"))
        where = "" if alone else " fit"
        return f" (see `{prog}{where} {HELP})"

    def _suggestion(self, text: str) -> str:
        found = re.search(
            r"(?:unrecognized arguments: --|[Oo]ption '|import path string: |attribute ')([\w.]+)",
            text,
        )
        if found is None or "did you mean" in text:
            return ""
        if missing := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
            module = sys.modules.get(missing[1])
            names = [*dir(module), *getattr(module, "__all__", ())]
            close = get_close_matches(missing[2], names, n=1)
            return f"; did you mean {close[0]}?" if close else ""
        known, words = self._known_names(), found[1].split(".")
        word = next((w for w in words if w not in known), words[-1])
        groups = {action.dest.split(".")[0] for action in self._actions}
        if len(words) > 1 and word == words[0] and get_close_matches(word, groups):
            known = groups
        if word in known:  # there is one of this name in another group
            whole = [a.dest for a in self._actions if a.dest.split(".")[-1] == word]
            close = get_close_matches(found[1], whole, n=1, cutoff=0.0)
        else:
            close = get_close_matches(word, sorted(known), n=1)
        if close:
            return f"; did you mean {close[0]}?"
        arguments = ", ".join(self._own_names()) or "no arguments"
        return f"; it has {arguments}" if self._of_a_class else ""

    @property
    def _of_a_class(self) -> bool:
        return bool(getattr(self, "_inner_parser", False))

    def _own_names(self) -> list[str]:
        dests = [action.dest.split(".")[0] for action in self._actions]
        hidden = {"help", "config", "print_config", "print_shtab"}
        return [d for d in dict.fromkeys(dests) if d not in hidden and not d.endswith("+")]

    def _known_names(self) -> set[str]:
        if self._of_a_class:
            return set(self._own_names())
        names = set()
        for home in kdrl_lightning.__all__:
            value = getattr(kdrl_lightning, home)
            if inspect.isclass(value) and not issubclass(value, Exception):
                names |= {home, *inspect.signature(value).parameters}
        parsers: list[Value] = [self]
        for action in self._actions:
            if isinstance(action.choices, dict):
                parsers += action.choices.values()
        for parser in parsers:
            names |= {name for action in parser._actions for name in action.dest.split(".")}
        return names

    def _check_value_key(self, action: Any, value: Value, *args: Any, **kwargs: Any) -> Any:
        # jsonargparse opens a file only if its name is a plain `str`.
        opens = getattr(action, "_enable_path", True)  # a group of settings always does
        if opens and isinstance(value, Text) and is_file(value):
            value = str(value)
        if value is None and action.default is not None and hasattr(action, "_typehint"):
            # jsonargparse treats null as "not given" and would pass None on unchecked.
            action._check_type_(None, mode=self.parser_mode)
        return super()._check_value_key(action, value, *args, **kwargs)


def _settings_of(config: str) -> Value:
    """Return the settings of a file or a text after ``--config``; None if it cannot be read."""
    try:
        text = Path(config).read_text(encoding="utf-8") if is_file(config) else config
        return load_with_base(text, config)
    except (ConfigurationError, OSError, ValueError):  # the parser says why
        return None


def is_file(name: str) -> bool:
    """Return whether a text is the path of a file, without an error if it cannot be a path."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def one_line(message: str) -> str:
    r"""Return a parser's message in one line, with nested keys joined by dots.

    >>> one_line("Parser key x:\n  Parser key \"y\":\n  Expected a <class 'int'>")
    "`x.y`: Expected a <class 'int'>"
    """
    text = " ".join(message.split())
    for found_words, ours in REWORDED.items():
        text = re.sub(found_words, ours, text)
    keys = []
    while found := KEY.match(text):
        keys.append(found[1] or found[2])
        text = text[found.end() :].lstrip()
    if not keys:
        return text
    if keys[0] == "config" and len(keys) > 1:  # a text after --config
        keys = keys[1:]
    if found := WRONG_TYPE.fullmatch(text):
        cure = " Quote it." if found[1] == "str" else ""
        text = f"must be {WORDS[found[1]]}: got {found[2]}.{cure}"
    return f"`{'.'.join(keys)}`{'' if text.startswith('must ') else ':'} {text}"
