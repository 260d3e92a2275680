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
    check_completions(data, module)
    unit = data.minibatches_per_rollout * trainer.world_size
    if data.prompts_per_rollout % unit:
        raise ConfigurationError(
            f"`prompts_per_rollout` must be a multiple of minibatches_per_rollout * processes "
            f"= {unit}: got {data.prompts_per_rollout}."
        )
    rows = data.prompts_per_rollout // unit * data.completions_per_prompt
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


def check_micro_batches(trainer: Any, data: RolloutDataModule, longest_prompt: int) -> None:
    """Check that a micro-batch of the longest completions fits the limit of tokens.

    Raises:
        ConfigurationError: it does not; the message names the accumulation that would fit.
    """
    limit = data.max_tokens_per_micro_batch
    if limit is None:
        return
    unit = data.minibatches_per_rollout * trainer.world_size
    rows = data.prompts_per_rollout // unit * data.completions_per_prompt
    longest = longest_prompt + data.train_sampling.max_tokens
    worst = -(-rows // trainer.accumulate_grad_batches) * longest
    if worst <= limit:
        return
    cure = f"Set `accumulate_grad_batches` {-(-rows // max(limit // longest, 1))}."
    if longest > limit:
        cure = f"One alone may have {longest}: lower `max_tokens`, or drop long prompts."
    raise ConfigurationError(
        f"`max_tokens_per_micro_batch` must hold the longest completions with their prompts, "
        f"{worst} tokens with accumulate_grad_batches {trainer.accumulate_grad_batches}: got "
        f"{limit}. {cure}"
    )


def check_completions(data: RolloutDataModule, module: Any) -> None:
    """Check that the objective can use the completions that student and teacher sample."""
    objective, name = module.objective, type(module.objective).__name__
    if isinstance(objective, SFT) and data.group_size:
        raise ConfigurationError(
            f"`group_size` must be 0 for SFT, which trains on given completions: got "
            f"{data.group_size}. Let the teacher sample them with `teacher_completions`, or use "
            "SupervisedDataModule."
        )
    size = data.completions_per_prompt
    if objective.needs_groups and size < 2:
        raise ConfigurationError(
            f"`group_size` must be at least 2 for {name}, whose advantages compare the completions "
            f"of one prompt: got {size}."
        )
    if data.collector.slots.max_refills and not objective.needs_groups:
        raise ConfigurationError(
            f"`max_refills` must be 0 for {name}, which does not compare a group: got "
            f"{data.collector.slots.max_refills}."
        )
    limit = getattr(data.rewards.reward, "max_tokens", data.train_sampling.max_tokens)
    if limit != data.train_sampling.max_tokens:
        raise ConfigurationError(
            f"`max_tokens` of the reward must be that of the data, "
            f"{data.train_sampling.max_tokens}: got {limit}."
        )
    if not data.teacher_completions:
        if getattr(objective, "teacher_tokens", None) is not None:
            raise ConfigurationError(
                "`teacher_completions` must be at least 1 for an objective with `teacher_tokens`: "
                "got 0. Set data.teacher_completions, or drop the rule."
            )
        return
    if not objective.takes_teacher_completions:
        raise ConfigurationError(
            f"`teacher_completions` must be 0 for {name} without a rule for them: got "
            f"{data.teacher_completions}. Give `teacher_tokens`, e.g. ShapedProbability (LUFFY) or "
            "BehaviorRatio."
        )
    if module.teacher is None or not module.teacher.generates:
        found = "no teacher" if module.teacher is None else type(module.teacher).__name__
        raise ConfigurationError(
            f"`teacher` must be one that can generate for `teacher_completions` "
            f"{data.teacher_completions}: got {found}. Use a LocalTeacher."
        )
