"""Saves and restores a module's identity and counters, and exports the student."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol, cast

import lightning.pytorch as pl
import torch

from kdrl_lightning.checkpoints.integrity import whole_folder
from kdrl_lightning.checkpoints.reader import check_readable, read_metadata
from kdrl_lightning.checkpoints.resume import (
    KEY,
    check_complete,
    check_identity,
    check_initial,
    identity,
    number_by_place,
)
from kdrl_lightning.common.untyped import State
from kdrl_lightning.models.loading import load_config
from kdrl_lightning.teachers.self_teachers import drop_kept
from kdrl_lightning.trainer.failures import export_together
from kdrl_lightning.trainer.protocols import TrainedModule


class Counters(Protocol):
    """Counts that a checkpoint keeps."""

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""

    def load_state_dict(self, state: State) -> None:
        """Restore the counts."""


class SavedModule(TrainedModule, Protocol):
    """The part of ``KDRLModule`` that a checkpoint saves and restores."""

    @property
    def trainer(self) -> pl.Trainer:
        """The trainer of the run."""

    @property
    def nonfinite(self) -> Counters:
        """The counts of skipped steps."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights of the student, and of self-teachers that are saved, by name."""

    def optimizers(self, use_pl_optimizer: Literal[False]) -> object:
        """Return the optimizer."""

    def log_state(self) -> State:
        """Return the state of the log."""

    def load_log_state(self, saved: State) -> None:
        """Restore the state of the log."""


def check_checkpoint(path: str, module: SavedModule, fitting: bool) -> None:
    """Check a checkpoint against a module before the strategy reads it.

    Args:
        path: path of the checkpoint.
        module: the ``KDRLModule`` that will load it.
        fitting: whether training continues; then the method must match, too.

    Raises:
        ConfigurationError: it is damaged, or belongs to another student or method.
    """
    values = read_metadata(path)
    saved, held = values.get(KEY), values.get("state_dict")
    check_readable(path, module.trainer.strategy)
    if saved is not None:
        loaded = module.student and module.weights().model.config  # or its text model's
        config = loaded or load_config(module.student_path)
        check_identity(saved, module, config, fitting, path)
    if module.lora is not None and held is not None:  # shards are checked when they are loaded
        wanted = module.state_dict()
        if not fitting:  # an evaluation needs no self-teacher
            held, wanted = drop_kept(held), drop_kept(wanted)
        check_complete(held.keys(), wanted.keys(), path)


def save_state(checkpoint: State, module: SavedModule, sharded: bool) -> None:
    """Add the run's identity and the module's counters to a checkpoint.

    Args:
        checkpoint: the state that Lightning will write.
        module: the ``KDRLModule``.
        sharded: whether the strategy numbers the optimizer's parameters itself.
    """
    checkpoint[KEY] = {
        **identity(module),
        **module.nonfinite.state_dict(),
        "teacher_seconds": module.teacher_seconds,
        **module.log_state(),
    }
    if not sharded:
        optimizer = module.optimizers(use_pl_optimizer=False)
        for state in checkpoint.get("optimizer_states", []):
            number_by_place(state, optimizer, cast(torch.nn.Module, module))


def load_state(checkpoint: State, module: SavedModule) -> None:
    """Restore the module's counters.

    Raises:
        ConfigurationError: the teacher is the student that the run started from, and ``student`` is
            now another model.
    """
    saved = checkpoint.get(KEY)
    if saved is not None:
        check_initial(module.frozen.initial_digests(), saved, module.student_path)
        module.nonfinite.load_state_dict(saved)
        module.frozen.seconds = saved["teacher_seconds"]
        module.load_log_state(saved)


def export_student(module: TrainedModule, trainer: pl.Trainer | None, path: str) -> None:
    """Write a module's student and tokenizer as a Hugging Face folder; all ranks must call it.

    Args:
        module: the ``KDRLModule``.
        trainer: the module's trainer; None outside of a run.
        path: path of the folder. The new student replaces an earlier one only when it is complete.

    Raises:
        TrainingStopped: on every rank, if the first one cannot write.
    """
    writes = trainer is None or trainer.is_global_zero
    write = module.weights().writer(writes)

    def write_both() -> None:
        if not writes:
            return
        with whole_folder(Path(path)) as half:
            write(str(half))
            module.tokenizer.save_pretrained(str(half))

    if trainer is None:
        write_both()
    else:
        export_together(trainer, write_both, path)
