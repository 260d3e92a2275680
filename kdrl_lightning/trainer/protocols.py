"""Protocols with the parts of module and data module that callbacks and checks use.

Lightning types the module as any ``LightningModule`` and the data module not at all; ``trained``
and ``rollout_data`` return them as the protocols of this file.
``rollout/policy.py`` has the part of the module that rollouts use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol, cast

import lightning.pytorch as pl
import torch

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.engines.base import RolloutEngine
from kdrl_lightning.models.lora import LoRA
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout.groups import Collector
from kdrl_lightning.rollout.live import LiveSampler
from kdrl_lightning.rollout.policy import Policy
from kdrl_lightning.rollout.settings import RolloutSettings
from kdrl_lightning.rollout.statistics import RolloutWatch
from kdrl_lightning.rollout_batch import RolloutBatch


class TrainedModule(Policy, Protocol):
    """A ``Policy``, and what else callbacks, checkpoints and checks use of the module."""

    @property
    def optimizer_callable(self) -> Callable[..., torch.optim.Optimizer]:
        """``parameters -> optimizer``."""

    @property
    def vocabulary(self) -> str:
        """Checksum of the student's tokens and their ids."""

    @property
    def lora(self) -> LoRA | None:
        """The adapters' settings; None trains all weights."""

    @property
    def student(self) -> torch.nn.Module | None:
        """The student, once it is loaded."""

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far because loss or gradient was not finite."""

    def base_digest(self) -> str:
        """Return a checksum of a LoRA student's base model; all ranks must call it."""

    def completed(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the micro-batch of the latest ``training_step`` with all scores that it used."""

    def log_step(self, values: Mapping[str, float | None]) -> None:
        """Log values of the current optimizer step."""

    @property
    def logged_names(self) -> Collection[str]:
        """Names that ``log_step`` got so far, with or without a value."""

    def write_step(self) -> None:
        """Hand the numbers of the finished step to the loggers, once."""


class RolloutData(Protocol):
    """The part of ``RolloutDataModule`` that callbacks and checks use."""

    rollout_engine: RolloutEngine
    collector: Collector
    live: LiveSampler
    rollout: RolloutSettings
    seed: int

    @property
    def val_prompts(self) -> object:
        """The validation sets; None if there are none."""

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout."""

    @property
    def completions_per_prompt(self) -> int:
        """Size of a group: the student's completions and the teacher's."""

    @property
    def teacher_seconds(self) -> float:
        """Seconds that the teacher has taken so far, to generate and to score."""

    @property
    def watch(self) -> RolloutWatch:
        """Statistics of the run's rollouts."""

    def evaluate(
        self,
        weights: ModelWeights,
        temperature: float | None = None,
        prompt_of: Callable[[Row], list[int] | None] | None = None,
        most: float = float("inf"),
    ) -> float:
        """Return a model's accuracy on the first validation set; all ranks must call it."""

    def cannot_evaluate(self, weights: ModelWeights) -> str:
        """Return why ``evaluate`` cannot sample from a model; empty if it can."""

    def probe(self) -> RolloutBatch:
        """Return a few tokens sampled from the engine's current weights, with scores."""


def student_of(module: TrainedModule) -> torch.nn.Module:
    """Return a run's student; call it after ``configure_model``, which loads it."""
    assert module.student is not None
    return module.student


# Lightning sets the attributes that the next two functions read without declaring them.
def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the trainer's callbacks."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def is_trial_run(trainer: pl.Trainer) -> bool:
    """Return whether the run is a trial that writes nothing (``fast_dev_run``)."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def trained(module: pl.LightningModule) -> TrainedModule:
    """Return the module as a ``TrainedModule``."""
    return cast(TrainedModule, module)


def rollout_data(trainer: pl.Trainer) -> RolloutData | None:
    """Return the trainer's data module; None if it does not sample rollouts."""
    data = getattr(trainer, "datamodule", None)  # Lightning sets it without declaring it
    return cast(RolloutData, data) if hasattr(data, "updates_per_rollout") else None
