"""Checks trainer settings that Lightning does not check, and adds values to Lightning's errors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jsonargparse import Namespace

from kdrl_lightning.errors import ConfigurationError, require_between

# Name, smallest value and advice, for settings for which Lightning takes any number.
LEAST = (
    ("accumulate_grad_batches", 1, "It is the number of micro-batches of an optimizer step."),
    ("gradient_clip_val", 0, "0 clips nothing."),
    ("log_every_n_steps", 0, "0 logs nothing."),
    ("min_steps", 0, "0 sets no minimum."),
    ("min_epochs", 0, "0 sets no minimum."),
    ("num_sanity_val_steps", -1, "-1 takes all batches."),
)
TIMES = ("days", "hours", "minutes", "seconds", "weeks", "milliseconds", "microseconds")


def check_trainer(trainer: Namespace) -> None:
    """Check the values of trainer settings that Lightning does not check.

    Raises:
        ConfigurationError: a value is wrong.
    """
    for name, low, cure in LEAST:
        value = trainer[name]
        if value is not None:
            require_between(f"trainer.{name}", value, low, float("inf"), cure)
    limit = trainer["max_time"]
    held = vars(limit) if isinstance(limit, Namespace) else limit
    unknown = [str(n) for n in held if n not in TIMES] if isinstance(held, Mapping) else []
    if unknown:
        raise ConfigurationError(
            f"`trainer.max_time` must have {', '.join(TIMES[:4])}: got {', '.join(unknown)}. "
            "Correct the name."
        )


def with_values(message: str, given: Mapping[str, object]) -> str:
    """Append to an error of Lightning the values of the settings that it names.

    Args:
        message: the error's text.
        given: the trainer's settings.

    >>> with_values("`devices` should be an int > 0.", {"devices": "two"})
    '`devices` should be an int > 0. Got `trainer.devices: two`.'
    """
    names = dict.fromkeys(re.findall(r"`(?:Trainer\()?(\w+)", message))
    plain = (str, int, float, bool, list)
    values = {n: given[n] for n in names if isinstance(given.get(n), plain)}
    new = [f"`trainer.{n}: {value}`" for n, value in values.items() if str(value) not in message]
    return f"{message.rstrip('.')}. Got {', '.join(new)}." if new else message
