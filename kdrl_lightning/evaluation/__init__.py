"""Evaluation: named sets of prompts, their batches, metrics and tables."""

from kdrl_lightning.evaluation.batch import EvaluationBatch
from kdrl_lightning.evaluation.bootstrap import bootstrap_interval
from kdrl_lightning.evaluation.majority import majority_at_k
from kdrl_lightning.evaluation.metric import EvaluationMetric
from kdrl_lightning.evaluation.metrics import EvaluationMetrics
from kdrl_lightning.evaluation.pass_at_k import pass_at_k
from kdrl_lightning.evaluation.sets import (
    EvalSet,
    EvalSets,
    EvaluationSettings,
    NamedSet,
    named_sets,
)
from kdrl_lightning.evaluation.source import EvaluationSource

__all__ = [
    "EvalSet",
    "EvalSets",
    "EvaluationBatch",
    "EvaluationMetric",
    "EvaluationMetrics",
    "EvaluationSettings",
    "EvaluationSource",
    "NamedSet",
    "bootstrap_interval",
    "majority_at_k",
    "named_sets",
    "pass_at_k",
]
