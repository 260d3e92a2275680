"""Objectives: presets that you choose by ``class_path``, and the parts that build them."""

from kdrl_lightning.common import old_names
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
from kdrl_lightning.objectives.methods.eopd import EOPD, FixedGap, TeacherTopK
from kdrl_lightning.objectives.methods.g_opd import GOPD, ExtrapolatedGap
from kdrl_lightning.objectives.methods.hdpo_published import (
    OwnGroup,
    PublishedHDPO,
    SolvedByTeacher,
)
from kdrl_lightning.objectives.methods.mixtures import RLSD, SRPO
from kdrl_lightning.objectives.methods.opsd import OPSD, ClippedForwardKL
from kdrl_lightning.objectives.methods.scope import SCOPE, RarityWeights
from kdrl_lightning.objectives.methods.sdar import SDAR, GatedGap
from kdrl_lightning.objectives.methods.sdft import SDFT
from kdrl_lightning.objectives.methods.sdpo import SDPO, CappedKL
from kdrl_lightning.objectives.methods.srpo_published import (
    ConfidenceWeightedKL,
    NotDistilled,
    PublishedSRPO,
)
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
    ExceptFirstTokens,
    Gates,
    Selection,
    WrongCompletions,
    WrongGroups,
)
from kdrl_lightning.objectives.sft import SFT

__all__ = [
    "CISPO",
    "EOPD",
    "GKD",
    "GOPD",
    "GRPO",
    "GSPO",
    "KDRL",
    "OPSD",
    "RLAD",
    "RLSD",
    "SCOPE",
    "SDAR",
    "SDFT",
    "SDPO",
    "SFT",
    "SRPO",
    "Advantage",
    "BehaviorRatio",
    "CappedKL",
    "ClippedDistillation",
    "ClippedForwardKL",
    "ConfidenceWeightedKL",
    "DistillTerm",
    "EngineCorrection",
    "ExceptEndToken",
    "ExceptFirstTokens",
    "ExtrapolatedGap",
    "FixedGap",
    "GapAdvantage",
    "GatedGap",
    "Gates",
    "MaskedImportance",
    "NoCorrection",
    "NotDistilled",
    "Objective",
    "OnPolicyDistillation",
    "OwnGroup",
    "Part",
    "PolicyObjective",
    "PublishedHDPO",
    "PublishedSRPO",
    "RarityWeights",
    "Ratio",
    "Reduction",
    "ReweightedAdvantage",
    "SampledKL",
    "Selection",
    "SequenceRatio",
    "ShapedAdvantage",
    "ShapedProbability",
    "SolvedByTeacher",
    "SumAdvantage",
    "SurrogateTerm",
    "TeacherTopK",
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
    cure = old_names.GONE.get(name)
    raise AttributeError(f"`{name}` is gone: {cure}" if cure else f"no attribute {name!r}")
