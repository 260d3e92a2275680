"""The base of callbacks that act at the start or the end of a rollout."""

from __future__ import annotations

from typing import Any, TypeAlias

import lightning.pytorch as pl

from kdrl_lightning.trainer.protocols import rollout_data

# Tensors by name, as `KDRLModule.training_step` returns them. `Any`: Lightning's type of them also
# allows a tensor or None, and an override must not narrow it.
StepOutputs: TypeAlias = Any


def updates_per_rollout(trainer: pl.Trainer) -> int:
    """Return the number of optimizer steps on one rollout; 1 if the data has no rollouts."""
    data = rollout_data(trainer)
    return 1 if data is None else data.updates_per_rollout


def starts_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether a micro-batch is the first of an optimizer step."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether a micro-batch is the last of an optimizer step.

    Lightning also takes a step after the last batch of an epoch, even if
    ``accumulate_grad_batches`` does not divide their number.
    """
    done = batch_idx + 1
    return done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches


# `batch` and `outputs` are `Any` as in Lightning: each module defines other types.
class RolloutCallback(pl.Callback):
    """Calls hooks at the start and the end of each rollout, and at the end of each optimizer step.

    Subclass it and override ``on_rollout_start``, ``on_step_end`` or ``on_rollout_end``. A rollout
    is used for ``updates_per_rollout`` optimizer steps (mini-batches times epochs), and each of
    these has ``accumulate_grad_batches`` micro-batches. The count follows from
    ``trainer.global_step``, so a run continues with the same numbers and needs no state, even if it
    resumes in the middle of a rollout. Data without rollouts, such as ``SupervisedDataModule``,
    counts each optimizer step as one rollout.

    If ``max_steps`` ends the run in the middle of a rollout, ``on_rollout_end`` is not called for
    that rollout. Use ``on_train_end`` for work that every run must do at its end.

    A subclass that overrides ``on_train_batch_start`` or ``on_train_batch_end`` must call the
    method of ``super()``.

    Example:
        >>> class Announce(RolloutCallback):
        ...     def on_rollout_end(self, trainer, pl_module, rollout):
        ...         print(f"rollout {rollout} is done")
    """

    def on_rollout_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, rollout: int
    ) -> None:
        """Act before the first update on a rollout, after it is sampled and scored.

        If a run resumes in the middle of a rollout, this hook is not called for that rollout.

        Args:
            trainer: the run's trainer.
            pl_module: the module in training.
            batch: the first micro-batch of the rollout.
            rollout: index of the rollout, from 0.
        """

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act after an optimizer step; ``trainer.global_step`` counts it already."""

    def on_rollout_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: int
    ) -> None:
        """Act after the last update on a rollout, and after ``on_step_end``.

        Args:
            trainer: the run's trainer.
            pl_module: the module in training.
            rollout: index of the rollout that ends, from 0.
        """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Call ``on_rollout_start`` at the first micro-batch of a rollout."""
        rollout, update = divmod(trainer.global_step, updates_per_rollout(trainer))
        if update == 0 and starts_step(trainer, batch_idx):
            self.on_rollout_start(trainer, pl_module, batch, rollout)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Call ``on_step_end`` and ``on_rollout_end`` after the last micro-batch of each."""
        if not ends_step(trainer, batch_idx):
            return
        self.on_step_end(trainer, pl_module)
        done, left = divmod(trainer.global_step, updates_per_rollout(trainer))
        if left == 0:
            self.on_rollout_end(trainer, pl_module, done - 1)
