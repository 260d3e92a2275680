"""Metrics: pass@1 for evaluation; statistics and histograms of one optimizer step."""

from kdrl_lightning.metrics.histograms import Histogram, Histograms
from kdrl_lightning.metrics.memory import peak_gb
from kdrl_lightning.metrics.pass_at_1 import PassAt1
from kdrl_lightning.metrics.step_stats import StepStats

__all__ = ["Histogram", "Histograms", "PassAt1", "StepStats", "peak_gb"]
