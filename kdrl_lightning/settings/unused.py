"""A warning for every setting that has no effect beside the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

VALIDATION = ("val_batch_size", "val_samples", "val_temperature", "val_k")
TRAINER = ("limit_val_batches", "val_check_interval", "check_val_every_n_epoch")


def warn_of_unused(config: Any, defaults: Any) -> None:
    """Warn of the settings that differ from their default and change nothing.

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
            [f"data.{name}" for name in VALIDATION],
            "data.val_prompts: null",
        ),
        (not data.teacher_completions, ["data.teacher_engine"], "data.teacher_completions: 0"),
    ]
    for holds, names, cause in rules:
        given = [name for name in names if holds and config[name] not in (None, defaults(name))]
        if given:
            verb = "has" if len(given) == 1 else "have"
            warnings.warn(
                f"{', '.join(f'`{name}`' for name in given)} {verb} no effect with `{cause}`.",
                stacklevel=2,
            )


def warn_of_dropped(where: str, names: Iterable[str], before: str, after: str) -> None:
    """Warn of the arguments of a class when another one takes its place.

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
        warnings.warn(
            f"{place}{new} takes the place of {old}, so {given} of {old} has no effect.",
            stacklevel=2,
        )
