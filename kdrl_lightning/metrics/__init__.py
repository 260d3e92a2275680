"""Metrics: pass@k and its kin for evaluation; statistics and histograms of one optimizer step."""

from kdrl_lightning.metrics.bootstrap import bootstrap_interval
from kdrl_lightning.metrics.evaluation import EvaluationMetric
from kdrl_lightning.metrics.histograms import Histogram, Histograms
from kdrl_lightning.metrics.majority import majority_at_k
from kdrl_lightning.metrics.memory import peak_gb
from kdrl_lightning.metrics.pass_at_k import pass_at_k
from kdrl_lightning.metrics.step_log import StepLog
from kdrl_lightning.metrics.step_stats import StepStats

__all__ = [
    "EvaluationMetric",
    "Histogram",
    "Histograms",
    "StepLog",
    "StepStats",
    "bootstrap_interval",
    "majority_at_k",
    "pass_at_k",
    "peak_gb",
]
