"""Collects notes for the user, mostly about settings that have no effect."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from jsonargparse import Namespace

VALIDATION = ("batch_size", "samples", "temperature", "k", "top_p", "top_k", "min_p")
TRAINER = ("limit_val_batches", "val_check_interval", "check_val_every_n_epoch")


# We print notes after everything is built, so that a mistake prints only one line.
_waiting: list[str] = []
_renamed: dict[str, str] = {}


def take_notes() -> list[str]:
    """Return the notes so far without duplicates, and clear them."""
    # jsonargparse reads some values twice, once without the name of their setting.
    notes = [n for n in dict.fromkeys(_waiting) if not any(w.endswith(f"`: {n}") for w in _waiting)]
    if _renamed:
        pairs = ", ".join(f"`{old}` is now `{new}`" for old, new in _renamed.items())
        notes.append(f"{pairs}. 0.3 removes the old names.")
    _waiting.clear()
    _renamed.clear()
    return notes


def note(line: str) -> None:
    """Store a note until everything is built, see ``take_notes``."""
    _waiting.append(line)


def note_renamed(old: str, new: str) -> None:
    """Note that a setting is given by its old name."""
    _renamed[old] = new


def as_written(text: str) -> str:
    """Return a message with the old names of settings, if the user wrote those."""
    for old, new in _renamed.items():
        text = re.sub(rf"`{re.escape(new)}(?=[.`])", f"`{old}", text)
    return text


def note_unused(config: Namespace, defaults: Callable[[str], object]) -> None:
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
            trainer.gradient_clip_val is None,
            ["trainer.gradient_clip_algorithm"],
            "trainer.gradient_clip_val: null",
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


def note_repeated(args: Sequence[object]) -> None:
    """Note the flags that are given several times, because only the last one counts.

    ``--config`` may be repeated, and so may arguments of classes that ``--name+`` appends.

    Args:
        args: the command line.
    """
    names = [word.split("=", 1)[0] for word in args if isinstance(word, str)]
    flags = [name for name in names if name.startswith("--") and not name.endswith("+")]
    lists = tuple(f"{name[:-1]}." for name in names if name.startswith("--") and name[-1] == "+")
    for flag in dict.fromkeys(flags):
        if flags.count(flag) > 1 and flag != "--config" and not f"{flag}.".startswith(lists or " "):
            _waiting.append(f"`{flag}` is given {flags.count(flag)} times: the last one counts.")


def note_dropped(where: str, names: Iterable[str], before: str, after: str) -> None:
    """Note the arguments of a class that are lost because another class replaces it.

    Args:
        where: name of the setting; empty if it is unknown.
        names: names of the arguments.
        before: import path of the old class.
        after: import path of the new class.
    """
    given = ", ".join(f"`{name}`" for name in names)
    if given:
        old, new = (path.rsplit(".", 1)[-1] for path in (before, after))
        place = f"`{where}`: " if where else ""
        _waiting.append(f"{place}{new} replaces {old}, so {given} of {old} has no effect.")


def note_replaced(where: str, what: str, lost: Iterable[str], cure: str) -> None:
    """Note what is lost when a new value replaces a list, a mapping or a class.

    Args:
        where: name of the setting.
        what: description of the old value.
        lost: entries that the new value lacks.
        cure: what to write to keep them; may be empty.
    """
    names = list(lost)
    if names:
        verb = "has" if len(names) == 1 else "have"
        line = f"`{where}` replaces {what}, so {', '.join(names)} {verb} no effect. {cure}"
        _waiting.append(line.rstrip())
