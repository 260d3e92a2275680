"""The command line's parser: what is wrong in one line, instead of after two screens of usage."""

from __future__ import annotations

import inspect
import os
import re
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

import kdrl_lightning
from kdrl_lightning.errors import ConfigurationError


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, with the nearest known name where a word is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise with one line; under ``JSONARGPARSE_DEBUG`` fail as jsonargparse does."""
        if os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        text = one_line(message)
        if "--help`" not in text:
            prog = self.prog.split(" [")[0].removesuffix(" fit")
            if not prog.startswith("python -m"):  # a parser that jsonargparse makes for one class
                prog = "python -m kdrl_lightning"
            alone = prog.endswith(("export", "evaluate")) or text.startswith("argument subcommand")
            where = "" if alone else " fit"
            text += f"{self._suggestion(text)} (see `{prog}{where} --help`)"
        raise ConfigurationError(text) from ex

    def _suggestion(self, text: str) -> str:
        found = re.search(
            r"(?:unrecognized arguments: --|[Oo]ption '|import path string: |attribute ')([\w.]+)",
            text,
        )
        if found is None:
            return ""
        word = found[1].split(".")[-1]
        close = get_close_matches(word, sorted(self._known_names()), n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def _known_names(self) -> set[str]:
        names = set()
        for home in kdrl_lightning.__all__:
            value = getattr(kdrl_lightning, home)
            if inspect.isclass(value) and not issubclass(value, Exception):
                names |= {home, *inspect.signature(value).parameters}
        parsers: list[Any] = [self]
        for action in self._actions:
            if isinstance(action.choices, dict):
                parsers += action.choices.values()
        for parser in parsers:
            names |= {action.dest.split(".")[-1] for action in parser._actions}
        return names


def one_line(message: str) -> str:
    r"""Fold a parser's message; of a union's alternatives only the class's own error is of use.

    >>> one_line("Parser key x:\n  - Expected a path\n  - Expected a dot import path string: Y")
    'Parser key x: Expected a dot import path string: Y'
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for i, line in enumerate(lines[1:], 1):
        if "Problem with given class_path" in line:
            return " ".join([lines[0], line.removeprefix("- "), *lines[i + 1 : i + 2]])
        if "Expected a dot import path" in line:
            return f"{lines[0]} {line.removeprefix('- ')}"
    return " ".join(lines)
