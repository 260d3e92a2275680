"""Checks for conflicts of objective, groups, engine and teacher, before training starts."""

from __future__ import annotations

import warnings

from kdrl_lightning.engines.base import RolloutEngine
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives.base import Objective
from kdrl_lightning.objectives.corrections import NoCorrection
from kdrl_lightning.objectives.sft import SFT
from kdrl_lightning.rewards.base import Reward, walk
from kdrl_lightning.rollout.groups import GroupShare
from kdrl_lightning.rollout.settings import RolloutSettings
from kdrl_lightning.teachers.base import Teacher


def check_groups(settings: RolloutSettings, teacher_completions: int) -> None:
    """Check that a group has at least one completion.

    Raises:
        ConfigurationError: the group is empty.
    """
    if settings.group_size + teacher_completions < 1:
        raise ConfigurationError(
            f"`group_size` must be at least 1 without `teacher_completions`: got "
            f"{settings.group_size}. Set one of them."
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
    """Check that engine and teacher support the rollouts; warn if stale ones are not corrected.

    Raises:
        ConfigurationError: the engine takes no weights, or the teacher refuses the temperature.
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
            "`engine_correction` is NoCorrection with `max_off_policy_steps` 1: the updates treat "
            "completions of older weights as if the current weights had sampled them. Use "
            "TruncatedImportance to correct for this.",
            stacklevel=2,
        )


def check_completions(
    objective: Objective, settings: RolloutSettings, teacher_share: GroupShare, reward: Reward
) -> None:
    """Check that the objective can use the groups, and that a length reward has the same limit.

    Raises:
        ConfigurationError: the objective cannot use them, or the ``max_tokens`` differ.
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
            f"`group_size` must be at least 2 for {name}, which compares the completions of one "
            f"prompt: got {size}. Sample more completions per prompt."
        )
    if settings.max_refills and not objective.needs_groups:
        raise ConfigurationError(
            f"`max_refills` must be 0 for {name}, which does not compare a group: got "
            f"{settings.max_refills}. Leave it out."
        )
    for part in walk(reward):
        limit = getattr(part, "max_tokens", settings.max_tokens)  # any callable is a reward
        if limit != settings.max_tokens:
            raise ConfigurationError(
                f"`max_tokens` of the reward must be that of the data, "
                f"{settings.max_tokens}: got {limit}. Set both to one value."
            )


def check_teacher_completions(
    objective: Objective, teacher: Teacher | None, share: GroupShare, engine: RolloutEngine
) -> None:
    """Check that the teacher can sample its completions, and that the objective uses them.

    Args:
        objective: the loss.
        teacher: the teacher of the configuration.
        share: how the teacher samples completions of a group.
        engine: samples the student's completions.

    Raises:
        ConfigurationError: the teacher cannot sample, or the objective does not use them.
    """
    if not share.count:
        if getattr(objective, "teacher_tokens", None) is not None:  # of a PolicyObjective
            raise ConfigurationError(
                "`teacher_completions` must be at least 1 for an objective with `teacher_tokens`: "
                "got 0. Set data.teacher_completions.count, or remove `teacher_tokens`."
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
    rules = (getattr(objective, name, None) for name in ("teacher_tokens", "ratio"))
    divided = [type(rule).__name__ for rule in rules if getattr(rule, "to_behavior", False)]
    if teacher.aligns and divided:
        raise ConfigurationError(
            "`teacher_completions` of a teacher with another tokenizer must have a rule without "
            f"the teacher's probabilities of the student's tokens: got {divided[0]}. Use "
            "ShapedProbability."
        )
    if engine.one_per_process and share.engine.one_per_process:
        raise ConfigurationError(
            "`teacher_completions.engine` must not be a second vLLM in this process: got "
            f"{type(share.engine).__name__} in addition to `rollout_engine` "
            f"{type(engine).__name__}. Leave "
            "it out, or serve the teacher and use VLLMTeacherEngine."
        )


def check_contexts(teacher: Teacher, completions: int) -> None:
    """Check that a group has a second completion if the teacher's context shows one.

    Args:
        teacher: the teacher of the configuration.
        completions: completions per prompt, of student and teacher.

    Raises:
        ConfigurationError: a group has one completion, and the context shows another one.
    """
    siblings = [context for context in teacher.contexts if context.reads_siblings]
    if siblings and completions < 2:
        raise ConfigurationError(
            f"`group_size` must be at least 2 for a {type(siblings[0]).__name__}, which shows "
            f"another completion of the group: got {completions}. Sample more completions per "
            "prompt."
        )
