"""From a rollout to optimizer steps: the plan of the updates, and the cut into micro-batches."""

from kdrl_lightning.rollout.updates.partition import partition
from kdrl_lightning.rollout.updates.plan import (
    FROZEN_TOKENS,
    TEACHER_FIELDS,
    Cut,
    RolloutPlan,
    Scoring,
    Waits,
    plan_updates,
    resume_updates,
    step_totals,
)

__all__ = [
    "FROZEN_TOKENS",
    "TEACHER_FIELDS",
    "Cut",
    "RolloutPlan",
    "Scoring",
    "Waits",
    "partition",
    "plan_updates",
    "resume_updates",
    "step_totals",
]
