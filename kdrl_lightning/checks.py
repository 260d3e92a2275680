"""Conflicts between trainer, data module and objective, found before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives.sft import SFT
from kdrl_lightning.rollout.loader import limited

if TYPE_CHECKING:
    from kdrl_lightning.datamodule import RolloutDataModule


def check_rollout_settings(trainer: Any, data: RolloutDataModule, module: Any) -> None:
    """Check that rollouts divide into optimizer steps on every process.

    Raises:
        ConfigurationError: they do not, or the objective cannot use such groups.
    """
    if isinstance(module.objective, SFT):
        raise ConfigurationError(
            "`objective` SFT must train on given completions: got rollouts of the student. "
            "Use SupervisedDataModule."
        )
    if module.objective.needs_groups and data.group_size < 2:
        raise ConfigurationError(
            f"`group_size` must be at least 2 for {type(module.objective).__name__}, whose "
            f"advantages compare the completions of one prompt: got {data.group_size}."
        )
    unit = data.minibatches_per_rollout * trainer.world_size
    if data.prompts_per_rollout % unit:
        raise ConfigurationError(
            f"`prompts_per_rollout` must be a multiple of minibatches_per_rollout * processes "
            f"= {unit}: got {data.prompts_per_rollout}."
        )
    rows = data.prompts_per_rollout // unit * data.group_size
    accumulate = trainer.accumulate_grad_batches
    if accumulate > rows:
        raise ConfigurationError(
            f"`accumulate_grad_batches` must be at most {rows}, the completions of one "
            f"optimizer step on one process: got {accumulate}."
        )
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):
        raise ConfigurationError(
            "`callbacks` must not change accumulate_grad_batches during a run: got "
            "GradientAccumulationScheduler. Set `accumulate_grad_batches` once."
        )
    length = len(data.train_dataloader())
    for name in ("limit_train_batches", "overfit_batches"):
        limit = getattr(trainer, name)
        batches = limited(length, limit)
        if batches % accumulate:
            raise ConfigurationError(
                f"`{name}` must not cut an optimizer step of {accumulate} micro-batches: got "
                f"{limit}, which is {batches} of {length}. Give a multiple."
            )
