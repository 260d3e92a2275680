"""Checks as early as possible that the metrics that callbacks monitor are logged."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from difflib import get_close_matches

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.trainer.internals import stop_after_validation
from kdrl_lightning.trainer.protocols import callbacks_of

# Classes outside of these packages may log other metrics.
KNOWN = ("kdrl_lightning.", "lightning.")


def check_validated(trainer: pl.Trainer) -> None:
    """Check that there is a validation if callbacks monitor its metrics.

    Also let EarlyStopping check its metric after each validation. Lightning checks it at the end of
    an epoch: if ``max_steps`` ends the epoch before its validation, the metric is missing, and the
    run would fail after its last step.

    Raises:
        ConfigurationError: there is no validation.
    """
    data = getattr(trainer, "datamodule", None)
    prompts = getattr(data, "val_prompts", True)
    for callback in callbacks_of(trainer):
        if not monitored(callback).startswith("val/") or not _is_lightnings(callback):
            continue
        if getattr(callback, "strict", True) and (prompts is None or not trainer.limit_val_batches):
            raise ConfigurationError(
                f"`monitor` of {type(callback).__name__} must be a metric that is logged: got "
                f"{monitored(callback)} without a validation. Set `data.val_prompts`, or remove "
                "the callback."
            )
        if isinstance(callback, EarlyStopping):
            stop_after_validation(callback)


def warn_of_late_validation(trainer: pl.Trainer) -> None:
    """Warn if a run ends before the first validation for which a callback waits."""
    last = trainer.max_steps * trainer.accumulate_grad_batches
    first = trainer.val_check_batch  # None: there is no validation, or its interval is a time
    if first is None or trainer.max_steps < 0 or not trainer.is_global_zero:
        return
    if trainer.check_val_every_n_epoch is not None:
        first += (trainer.check_val_every_n_epoch - 1) * trainer.num_training_batches
    for callback in callbacks_of(trainer):
        waits = monitored(callback).startswith("val/") and _is_lightnings(callback)
        if waits and first > last:
            warnings.warn(
                f"{type(callback).__name__} never gets {monitored(callback)}: the first validation "
                f"would be after {first / trainer.accumulate_grad_batches:g} optimizer steps, and "
                f"`max_steps` is {trainer.max_steps}. Lower `trainer.val_check_interval`.",
                stacklevel=2,
            )


def check_logged(trainer: pl.Trainer, names: Collection[str]) -> None:
    """Check after the first optimizer step that monitored training metrics are logged.

    Args:
        trainer: the run's trainer.
        names: names that the module has logged so far, with or without a value.

    Raises:
        ConfigurationError: a callback monitors a metric that is not among them.
    """
    others = [*callbacks_of(trainer), trainer.lightning_module, getattr(trainer, "datamodule", "")]
    if not all(type(one).__module__.startswith((*KNOWN, "builtins")) for one in others):
        return
    known = {*names, *trainer.callback_metrics}
    for callback in callbacks_of(trainer):
        name = monitored(callback)
        missing = bool(name) and not name.startswith("val/") and name not in known
        if missing and getattr(callback, "strict", True):
            close = get_close_matches(name, sorted(known), n=1)
            cure = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(sorted(known))}."
            raise ConfigurationError(
                f"`monitor` of {type(callback).__name__} must be a metric that is logged: got "
                f"{name}. {cure}"
            )
        if isinstance(callback, EarlyStopping) and name in names:
            callback.strict = False  # the epoch may end with a step that has no value for it


def check_monitors(trainer: pl.Trainer) -> None:
    """Check after a validation that it logged the metrics that callbacks monitor.

    Raises:
        ConfigurationError: a metric is missing.
    """
    for callback in callbacks_of(trainer):
        name, known = monitored(callback), trainer.callback_metrics
        strict = getattr(callback, "strict", True)
        if strict and name.startswith("val/") and name not in known:
            raise ConfigurationError(
                f"`monitor` must be a metric of the validation: got {name}. "
                f"Known: {', '.join(sorted(known))}."
            )


def monitored(callback: pl.Callback) -> str:
    """Return the metric that a callback monitors; empty if it monitors none."""
    name = getattr(callback, "monitor", None)
    return name if isinstance(name, str) else ""


def _is_lightnings(callback: pl.Callback) -> bool:
    """Return whether a callback is an EarlyStopping or ModelCheckpoint of Lightning or a user."""
    ours = type(callback).__module__.startswith(KNOWN[0])
    return isinstance(callback, EarlyStopping | ModelCheckpoint) and not ours
