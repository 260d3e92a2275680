"""Objectives: presets that you choose by ``class_path``, and the parts that build them."""

from kdrl_lightning import _moved
from kdrl_lightning.losses.logprobs import TokenScores
from kdrl_lightning.objectives.advantages import (
    Advantage,
    GapAdvantage,
    ReweightedAdvantage,
    ShapedAdvantage,
    SumAdvantage,
    VerdictAdvantage,
)
from kdrl_lightning.objectives.base import Objective, Part, Reduction, Term
from kdrl_lightning.objectives.corrections import (
    EngineCorrection,
    MaskedImportance,
    NoCorrection,
    TruncatedImportance,
)
from kdrl_lightning.objectives.distillation import (
    GKD,
    ClippedDistillation,
    OnPolicyDistillation,
)
from kdrl_lightning.objectives.divergences import (
    DistillTerm,
    SampledKL,
    SurrogateTerm,
    VocabularyKL,
)
from kdrl_lightning.objectives.grpo import CISPO, GRPO, GSPO
from kdrl_lightning.objectives.kdrl import KDRL
from kdrl_lightning.objectives.mixtures import RLSD, SRPO
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import (
    BehaviorRatio,
    Ratio,
    SequenceRatio,
    ShapedProbability,
    TokenRatio,
    TrustRegionRatio,
    WeightRatio,
)
from kdrl_lightning.objectives.rlad import RLAD
from kdrl_lightning.objectives.selections import (
    ExceptEndToken,
    Gates,
    Selection,
    WrongCompletions,
    WrongGroups,
)
from kdrl_lightning.objectives.sft import SFT

__all__ = [
    "CISPO",
    "GKD",
    "GRPO",
    "GSPO",
    "KDRL",
    "RLAD",
    "RLSD",
    "SFT",
    "SRPO",
    "Advantage",
    "BehaviorRatio",
    "ClippedDistillation",
    "DistillTerm",
    "EngineCorrection",
    "ExceptEndToken",
    "GapAdvantage",
    "Gates",
    "MaskedImportance",
    "NoCorrection",
    "Objective",
    "OnPolicyDistillation",
    "Part",
    "PolicyObjective",
    "Ratio",
    "Reduction",
    "ReweightedAdvantage",
    "SampledKL",
    "Selection",
    "SequenceRatio",
    "ShapedAdvantage",
    "ShapedProbability",
    "SumAdvantage",
    "SurrogateTerm",
    "Term",
    "TokenRatio",
    "TokenScores",
    "TruncatedImportance",
    "TrustRegionRatio",
    "VerdictAdvantage",
    "VocabularyKL",
    "WeightRatio",
    "WrongCompletions",
    "WrongGroups",
]


def __getattr__(name: str) -> object:
    cure = _moved.GONE.get(name)
    raise AttributeError(f"`{name}` is gone: {cure}" if cure else f"no attribute {name!r}")
