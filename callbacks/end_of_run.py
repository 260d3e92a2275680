"""What may fail at the end of a run: tried at the start, and kept from costing the student."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping

from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.rollout.together import stop_together


def write_or_warn(file: Path, write: Callable[[], Any]) -> None:
    """Write something that a run can do without; if that fails, warn and continue."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"{file} could not be written: {reason}", stacklevel=2)


def save_student(trainer: Any, pl_module: Any, folder: Path, alone: bool = False) -> None:
    """Write the student as a Hugging Face folder, whole or not at all.

    Args:
        trainer: of the run.
        pl_module: with the student.
        folder: to write to; a model there is replaced.
        alone: other ranks may be somewhere else: the first one writes without asking them.

    Raises:
        TrainingStopped: on all ranks, if it cannot be written.
    """
    first, half = trainer.is_global_zero, folder.with_name(f"{folder.name}.unfinished")

    def write() -> None:
        try:
            if first:
                shutil.rmtree(half, ignore_errors=True)
            pl_module.weights().save(str(half), first)
            if first:
                write_or_warn(
                    half / "tokenizer", lambda: pl_module.tokenizer.save_pretrained(str(half))
                )
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(half, folder)
        except OSError as error:
            raise TrainingStopped(
                f"the student must be writable: got {type(error).__name__}: {error}. Its weights "
                "are in the last checkpoint: make room, and use `export`."
            ) from error

    if alone:
        write()
    else:
        stop_together(write, pl_module.reduce)


def check_early_stopping(trainer: Any) -> None:
    """Let EarlyStopping look at a metric of the validation after each validation.

    Lightning asks at the end of an epoch, also of one that ``max_steps`` ends before its
    validation: then the metric is missing, and the run dies after its last step.

    Raises:
        ConfigurationError: there is no validation.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.monitor.startswith("val/"):
            prompts = getattr(trainer.datamodule, "val_prompts", True)
            if callback.strict and (prompts is None or trainer.limit_val_batches == 0):
                raise ConfigurationError(
                    f"`monitor` of EarlyStopping must be a metric that is logged: got "
                    f"{callback.monitor} without a validation. Set `data.val_prompts`, or drop it."
                )
            callback._check_on_train_epoch_end = False


def check_monitors(trainer: Any) -> None:
    """Check after a validation that callbacks watch metrics that it has.

    Raises:
        ConfigurationError: one does not.
    """
    for callback in trainer.callbacks:
        name = getattr(callback, "monitor", None)
        strict = getattr(callback, "strict", True)
        known = trainer.callback_metrics
        if strict and isinstance(name, str) and name.startswith("val/") and name not in known:
            raise ConfigurationError(
                f"`monitor` must be a metric of the validation: got {name}. "
                f"Known: {', '.join(sorted(known))}."
            )
