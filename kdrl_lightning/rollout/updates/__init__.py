"""From a rollout to optimizer steps: the split into micro-batches, their scores, and the plan."""

from kdrl_lightning.rollout.updates.cut import Cut
from kdrl_lightning.rollout.updates.partition import partition
from kdrl_lightning.rollout.updates.plan import (
    RolloutPlan,
    plan_updates,
    resume_updates,
    step_totals,
)
from kdrl_lightning.rollout.updates.scoring import FROZEN_TOKENS, TEACHER_FIELDS, Scoring, Waits

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
