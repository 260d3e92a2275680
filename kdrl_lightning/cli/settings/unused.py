"""A line for every setting that has no effect beside the others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

VALIDATION = ("batch_size", "samples", "temperature", "k")
TRAINER = ("limit_val_batches", "val_check_interval", "check_val_every_n_epoch")


# They wait until everything is built: a mistake is answered by one line alone.
_waiting: list[str] = []
_renamed: dict[str, str] = {}


def take_notes() -> list[str]:
    """Return the lines so far, each once, and forget them."""
    notes = list(dict.fromkeys(_waiting))
    if _renamed:
        pairs = ", ".join(f"`{old}` is now `{new}`" for old, new in _renamed.items())
        notes.append(f"{pairs}. The old names go with 0.3.")
    _waiting.clear()
    _renamed.clear()
    return notes


def note(line: str) -> None:
    """Keep a line until everything is built, see ``take_notes``."""
    _waiting.append(line)


def note_renamed(old: str, new: str) -> None:
    """Note a setting that is given by its former name."""
    _renamed[old] = new


def as_written(text: str) -> str:
    """Return a message about settings with the names that the user gave them."""
    for old, new in _renamed.items():
        text = re.sub(rf"`{re.escape(new)}(?=[.`])", f"`{old}", text)
    return text


def note_unused(config: Any, defaults: Any) -> None:
    """Note the settings that differ from their default and change nothing.

    Args:
        config: all settings, before anything is built.
        defaults: returns the default of a setting, by its name with dots.
    """
    data, trainer = config.data, config.trainer
    rules: list[tuple[bool, Iterable[str], str]] = [
        (
            trainer.enable_checkpointing is False,
            [f"checkpoint.{name}" for name in vars(config.checkpoint)],
            "trainer.enable_checkpointing: false",
        ),
        (
            data.val_prompts is None,
            [f"trainer.{name}" for name in TRAINER],
            "data.val_prompts: null",
        ),
        (
            data.val_prompts is None and data.test_prompts is None,
            [f"data.evaluation.{name}" for name in VALIDATION],
            "data.val_prompts: null",
        ),
        (
            not data.teacher_completions.count,
            ["data.teacher_completions.engine"],
            "data.teacher_completions.count: 0",
        ),
    ]
    for holds, names, cause in rules:
        given = [name for name in names if holds and config[name] not in (None, defaults(name))]
        if given:
            verb = "has" if len(given) == 1 else "have"
            listed = ", ".join(f"`{name}`" for name in given)
            _waiting.append(f"{listed} {verb} no effect with `{cause}`.")


def note_repeated(args: Any) -> None:
    """Note the flags that are given twice, of which the last counts.

    ``--config`` may be repeated, and so may the arguments of classes that ``+`` adds to a list.

    Args:
        args: the command line, if it is a list of words.
    """
    names = [word.split("=", 1)[0] for word in args if isinstance(word, str)]
    flags = [name for name in names if name.startswith("--") and not name.endswith("+")]
    lists = tuple(f"{name[:-1]}." for name in names if name.startswith("--") and name[-1] == "+")
    for flag in dict.fromkeys(flags):
        if flags.count(flag) > 1 and flag != "--config" and not f"{flag}.".startswith(lists or " "):
            _waiting.append(f"`{flag}` stands {flags.count(flag)} times: the last one counts.")


def note_dropped(where: str, names: Iterable[str], before: str, after: str) -> None:
    """Note the arguments of a class when another one takes its place.

    Args:
        where: the setting; empty if it is not known.
        names: the arguments.
        before: import path of the class.
        after: of the other one.
    """
    given = ", ".join(f"`{name}`" for name in names)
    if given:
        old, new = (path.rsplit(".", 1)[-1] for path in (before, after))
        place = f"`{where}`: " if where else ""
        _waiting.append(
            f"{place}{new} takes the place of {old}, so {given} of {old} has no effect."
        )


def note_replaced(where: str, what: str, lost: Iterable[str], cure: str) -> None:
    """Note what a list or a mapping loses when another one takes its place.

    Args:
        where: the setting.
        what: the one that is replaced.
        lost: what the other one has not.
        cure: what to write to keep it.
    """
    names = list(lost)
    if names:
        verb = "has" if len(names) == 1 else "have"
        _waiting.append(
            f"`{where}` replaces {what}, so {', '.join(names)} {verb} no effect. {cure}"
        )
