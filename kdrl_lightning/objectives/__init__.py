"""Objectives: small classes, chosen by ``class_path``, that compose pure losses."""

from kdrl_lightning.objectives.base import Objective, Reduction, Term, TokenScores
from kdrl_lightning.objectives.distillation import OnPolicyDistillation
from kdrl_lightning.objectives.grpo import GRPO
from kdrl_lightning.objectives.kdrl import KDRL
from kdrl_lightning.objectives.rlad import RLAD
from kdrl_lightning.objectives.sft import SFT

__all__ = [
    "GRPO",
    "KDRL",
    "RLAD",
    "SFT",
    "Objective",
    "OnPolicyDistillation",
    "Reduction",
    "Term",
    "TokenScores",
]
