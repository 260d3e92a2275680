"""Conflicts between trainer, data module and objective, found before anything is trained."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from kdrl_lightning.engines.base import RolloutEngine
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives.corrections import NoCorrection
from kdrl_lightning.objectives.sft import SFT
from kdrl_lightning.rewards.base import walk
from kdrl_lightning.rollout.loader import limited


def check_rollout_settings(trainer: Any, data: Any, module: Any) -> None:
    """Check that rollouts divide into optimizer steps on every process.

    Raises:
        ConfigurationError: they do not, or the objective cannot use such groups.
    """
    check_completions(data, module)
    if data.rollout_engine.fixed:
        raise ConfigurationError(
            f"`rollout_engine` must be one that takes the student's weights: got "
            f"{type(data.rollout_engine).__name__}. Use VLLMServerEngine."
        )
    if module.teacher is not None:
        module.teacher.check_temperature(data.train_sampling.temperature)
    parts = list(module.objective.parts())
    if data.max_off_policy_steps and any(isinstance(p, NoCorrection) for p in parts):
        warnings.warn(
            "`engine_correction` is NoCorrection with `max_off_policy_steps` 1: the updates take "
            "completions of older weights as their own. TruncatedImportance weights them.",
            stacklevel=2,
        )
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


def check_groups(
    group_size: int,
    teacher_completions: int,
    temperature: float,
    teacher_temperature: float | None,
) -> None:
    """Check what a group is made of.

    Raises:
        ConfigurationError: it is empty, or sampled at a temperature that cannot be.
    """
    if group_size + teacher_completions < 1:
        raise ConfigurationError(
            f"`group_size` must be at least 1 without `teacher_completions`: got {group_size}."
        )
    if teacher_temperature is not None and not teacher_completions:
        raise ConfigurationError(
            f"`teacher_temperature` must go with `teacher_completions`: got "
            f"{teacher_temperature} and no completions."
        )
    for name, heat in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if heat is not None and not 0.0 < heat < float("inf"):
            raise ConfigurationError(
                f"`{name}` must be above 0 for rollouts: got {heat}. "
                "Greedy sampling has no gradient; 1.0 is usual."
            )


def check_off_policy(max_off_policy_steps: int, engine: RolloutEngine) -> None:
    """Check that rollouts can be sampled as far ahead.

    Raises:
        ConfigurationError: they cannot.
    """
    if max_off_policy_steps not in (0, 1):
        raise ConfigurationError(
            f"`max_off_policy_steps` must be 0 or 1 rollouts: got {max_off_policy_steps}."
        )
    if max_off_policy_steps and not engine.beside:
        raise ConfigurationError(
            f"`max_off_policy_steps` must be 0 for an engine that shares the trainer's process: "
            f"got {max_off_policy_steps} and {type(engine).__name__}. Use VLLMServerEngine."
        )


def check_micro_batches(trainer: Any, data: Any, longest_prompt: int) -> None:
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


def longest_that_fits(trainer: Any, data: Any) -> int | None:
    """Return the longest prompt whose completions fit a micro-batch; None without a limit."""
    limit = data.max_tokens_per_micro_batch
    if limit is None:
        return None
    unit = data.minibatches_per_rollout * trainer.world_size
    rows = data.prompts_per_rollout // unit * data.completions_per_prompt
    each = -(-rows // trainer.accumulate_grad_batches)
    return int(limit // each - data.train_sampling.max_tokens)


def overfit_rollouts(trainer: Any, data: Any) -> int:
    """Return after how many rollouts ``overfit_batches`` repeats their prompts; 0: it is not set.

    Raises:
        ConfigurationError: it would end an epoch in the middle of a rollout.
    """
    limit = trainer.overfit_batches
    if not limit:
        return 0
    length = len(data.train_dataloader())
    each = data.updates_per_rollout * trainer.accumulate_grad_batches
    batches = limited(length, limit)
    if batches % each or not batches:
        raise ConfigurationError(
            f"`overfit_batches` must be whole rollouts of {each} micro-batches, whose prompts then "
            f"come again and again: got {limit}, which is {batches} of {length}. "
            f"Set `overfit_batches: {max(batches // each, 1) * each}`."
        )
    return int(batches // each)


def check_completions(data: Any, module: Any) -> None:
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
    for reward in walk(data.rewards.reward):
        limit = getattr(reward, "max_tokens", data.train_sampling.max_tokens)
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
    if module.teacher is None or not (module.teacher.generates or data.teacher_engine.fixed):
        found = "no teacher" if module.teacher is None else type(module.teacher).__name__
        raise ConfigurationError(
            f"`teacher` must be one that can generate for `teacher_completions` "
            f"{data.teacher_completions}: got {found}. Use a LocalTeacher, or a server with "
            "`teacher_engine` VLLMTeacherEngine."
        )
