"""Evaluation: named sets of prompts, their batches, metrics and tables."""

from kdrl_lightning.evaluation.batch import EvaluationBatch
from kdrl_lightning.evaluation.metrics import EvaluationMetrics
from kdrl_lightning.evaluation.sets import EvalSet, EvalSets, NamedSet, named_sets
from kdrl_lightning.evaluation.source import EvaluationSource

__all__ = [
    "EvalSet",
    "EvalSets",
    "EvaluationBatch",
    "EvaluationMetrics",
    "EvaluationSource",
    "NamedSet",
    "named_sets",
]
