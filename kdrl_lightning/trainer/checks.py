"""Conflicts between trainer, rollouts and objective, found before anything is trained."""

from __future__ import annotations

import warnings

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler

from kdrl_lightning.engines.base import RolloutEngine
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives.base import Objective
from kdrl_lightning.objectives.corrections import NoCorrection
from kdrl_lightning.objectives.sft import SFT
from kdrl_lightning.rewards.base import Reward, walk
from kdrl_lightning.rollout.groups import GroupShare
from kdrl_lightning.rollout.loader import limited
from kdrl_lightning.rollout.settings import RolloutSettings
from kdrl_lightning.teachers.base import Teacher


def check_groups(settings: RolloutSettings, teacher_completions: int) -> None:
    """Check that a group has completions.

    Raises:
        ConfigurationError: it is empty.
    """
    if settings.group_size + teacher_completions < 1:
        raise ConfigurationError(
            f"`group_size` must be at least 1 without `teacher_completions`: got "
            f"{settings.group_size}."
        )


def check_off_policy(settings: RolloutSettings, engine: RolloutEngine) -> None:
    """Check that rollouts can be sampled in advance.

    Raises:
        ConfigurationError: the engine cannot sample while the student trains.
    """
    steps = settings.max_off_policy_steps
    if steps and not engine.supports_async:
        raise ConfigurationError(
            f"`max_off_policy_steps` must be 0 for an engine that shares the trainer's process: "
            f"got {steps} and {type(engine).__name__}. Use VLLMServerEngine."
        )


def check_policy(
    objective: Objective,
    teacher: Teacher | None,
    settings: RolloutSettings,
    engine: RolloutEngine,
) -> None:
    """Check that engine and teacher can take part in such rollouts; warn of stale ones.

    Raises:
        ConfigurationError: the engine takes no weights, or the teacher no such temperature.
    """
    if engine.has_own_weights:
        raise ConfigurationError(
            f"`rollout_engine` must be one that takes the student's weights: got "
            f"{type(engine).__name__}. Use VLLMServerEngine."
        )
    if teacher is not None:
        teacher.check_temperature(settings.temperature)
    if settings.max_off_policy_steps and any(
        isinstance(part, NoCorrection) for part in objective.parts()
    ):
        warnings.warn(
            "`engine_correction` is NoCorrection with `max_off_policy_steps` 1: the updates take "
            "completions of older weights as their own. TruncatedImportance weights them.",
            stacklevel=2,
        )


def check_steps(trainer: Trainer, settings: RolloutSettings, group: int, length: int) -> None:
    """Check that rollouts divide into optimizer steps on every process.

    Args:
        trainer: of the run.
        settings: of its rollouts.
        group: completions of one prompt, the teacher's too.
        length: micro-batches of a trainer epoch.

    Raises:
        ConfigurationError: they do not.
    """
    unit = settings.minibatches_per_rollout * trainer.world_size
    if settings.prompts_per_rollout % unit:
        raise ConfigurationError(
            f"`prompts_per_rollout` must be a multiple of minibatches_per_rollout * processes "
            f"= {unit}: got {settings.prompts_per_rollout}."
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # as below
    rows = rows_of_step(trainer, settings, group)
    accumulate = trainer.accumulate_grad_batches
    if accumulate > rows:
        raise ConfigurationError(
            f"`accumulate_grad_batches` must be at most {rows}, the completions of one "
            f"optimizer step on one process: got {accumulate}."
        )
    if any(isinstance(c, GradientAccumulationScheduler) for c in callbacks):
        raise ConfigurationError(
            "`callbacks` must not change accumulate_grad_batches during a run: got "
            "GradientAccumulationScheduler. Set `accumulate_grad_batches` once."
        )
    limits = {
        "limit_train_batches": trainer.limit_train_batches,
        "overfit_batches": overfit_batches(trainer),
    }
    for name, limit in limits.items():
        batches = limited(length, limit)
        if batches % accumulate:
            raise ConfigurationError(
                f"`{name}` must not cut an optimizer step of {accumulate} micro-batches: got "
                f"{limit}, which is {batches} of {length}. Give a multiple."
            )


def overfit_batches(trainer: Trainer) -> int | float:
    """Return ``overfit_batches``, which Lightning sets without declaring it."""
    limit: int | float = trainer.overfit_batches  # type: ignore[attr-defined]
    return limit


def rows_of_step(trainer: Trainer, settings: RolloutSettings, group: int) -> int:
    """Return the completions of one optimizer step on one process."""
    unit = settings.minibatches_per_rollout * trainer.world_size
    return settings.prompts_per_rollout // unit * group


def check_micro_batches(
    trainer: Trainer, settings: RolloutSettings, group: int, longest_prompt: int
) -> None:
    """Check that a micro-batch of the longest completions fits the limit of tokens.

    Raises:
        ConfigurationError: it does not; the message names the accumulation that would fit.
    """
    limit = settings.max_tokens_per_micro_batch
    if limit is None:
        return
    rows = rows_of_step(trainer, settings, group)
    longest = longest_prompt + settings.max_tokens
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


def longest_that_fits(trainer: Trainer, settings: RolloutSettings, group: int) -> int | None:
    """Return the longest prompt whose completions fit a micro-batch; None without a limit."""
    limit = settings.max_tokens_per_micro_batch
    if limit is None:
        return None
    each = -(-rows_of_step(trainer, settings, group) // trainer.accumulate_grad_batches)
    return limit // each - settings.max_tokens


def overfit_rollouts(trainer: Trainer, settings: RolloutSettings, length: int) -> int:
    """Return after how many rollouts ``overfit_batches`` repeats their prompts; 0: it is not set.

    Args:
        trainer: of the run.
        settings: of its rollouts.
        length: micro-batches of a trainer epoch.

    Raises:
        ConfigurationError: it would end an epoch in the middle of a rollout.
    """
    limit = overfit_batches(trainer)
    if not limit:
        return 0
    each = settings.updates_per_rollout * trainer.accumulate_grad_batches
    batches = limited(length, limit)
    if batches % each or not batches:
        raise ConfigurationError(
            f"`overfit_batches` must be whole rollouts of {each} micro-batches, whose prompts then "
            f"come again and again: got {limit}, which is {batches} of {length}. "
            f"Set `overfit_batches: {max(batches // each, 1) * each}`."
        )
    return batches // each


def check_completions(
    objective: Objective, settings: RolloutSettings, teacher_share: GroupShare, reward: Reward
) -> None:
    """Check that the objective can use such groups, and that the reward knows their length.

    Raises:
        ConfigurationError: it cannot.
    """
    name = type(objective).__name__
    if isinstance(objective, SFT) and settings.group_size:
        raise ConfigurationError(
            f"`group_size` must be 0 for SFT, which trains on given completions: got "
            f"{settings.group_size}. Let the teacher sample them with `teacher_completions`, or "
            "use SupervisedDataModule."
        )
    size = settings.group_size + teacher_share.count
    if objective.needs_groups and size < 2:
        raise ConfigurationError(
            f"`group_size` must be at least 2 for {name}, whose advantages compare the completions "
            f"of one prompt: got {size}."
        )
    if settings.max_refills and not objective.needs_groups:
        raise ConfigurationError(
            f"`max_refills` must be 0 for {name}, which does not compare a group: got "
            f"{settings.max_refills}."
        )
    for part in walk(reward):
        limit = getattr(part, "max_tokens", settings.max_tokens)  # any callable is a reward
        if limit != settings.max_tokens:
            raise ConfigurationError(
                f"`max_tokens` of the reward must be that of the data, "
                f"{settings.max_tokens}: got {limit}."
            )


def check_teacher_completions(
    objective: Objective, teacher: Teacher | None, share: GroupShare
) -> None:
    """Check that the teacher can sample its completions, and that the objective has a use for them.

    Raises:
        ConfigurationError: it cannot.
    """
    if not share.count:
        if getattr(objective, "teacher_tokens", None) is not None:  # of a PolicyObjective
            raise ConfigurationError(
                "`teacher_completions` must be at least 1 for an objective with `teacher_tokens`: "
                "got 0. Set data.teacher_completions.count, or drop the rule."
            )
        return
    if not objective.takes_teacher_completions:
        raise ConfigurationError(
            f"`teacher_completions` must be 0 for {type(objective).__name__} without a rule for "
            f"them: got {share.count}. Give `teacher_tokens`, e.g. ShapedProbability (LUFFY) or "
            "BehaviorRatio."
        )
    if teacher is None or not (teacher.generates or share.engine.has_own_weights):
        found = "no teacher" if teacher is None else type(teacher).__name__
        raise ConfigurationError(
            f"`teacher` must be one that can generate for `teacher_completions` "
            f"{share.count}: got {found}. Use a LocalTeacher, or a server with "
            "`teacher_completions.engine` VLLMTeacherEngine."
        )
