"""Errors for files that a run cannot write, with the command that recovers the student."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import lightning.pytorch as pl
from torch.distributed.checkpoint.api import CheckpointException

from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.trainer.protocols import trained


def export_together(trainer: pl.Trainer, write: Callable[[], None], path: str) -> None:
    """Write the student; if the first rank cannot, all ranks stop.

    Raises:
        TrainingStopped: on every rank; the message names the checkpoint that holds the student, if
            there is one.
    """

    def tried() -> None:
        try:
            write()
        except Exception as error:
            raise not_exported(trainer, path, error) from error

    stop_together(tried, trained(trainer.lightning_module).reduce)


def not_exported(trainer: pl.Trainer, path: str, error: BaseException) -> TrainingStopped:
    """Return the error to raise if the student cannot be written; it names the export command."""
    callback = trainer.checkpoint_callback
    names = ("last_model_path", "best_model_path")  # Lightning's callback may know only the best
    saved = next(filter(None, (getattr(callback, name, "") for name in names)), None)
    cure = "The run saved no checkpoint: make room, and train again with checkpoints."
    if saved is not None:
        flags = shlex.join(["--ckpt_path", str(saved), "--output", path])
        cure = f"Make room, and run `python -m kdrl_lightning export {flags}`."
    return TrainingStopped(
        f"the student must be writable to {path}: got {reason_of(error)}. {cure}"
    )


def reason_of(error: BaseException) -> str:
    """Return one line that says why something could not be written."""
    cause = cause_of(error)
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def cause_of(error: BaseException) -> BaseException:
    """Return the system's error, e.g. of a full disk, which torch wraps in another."""
    if isinstance(error, CheckpointException):  # it holds the errors of all ranks
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
