"""Statistics and histograms of one optimizer step; a watch for values that are not finite."""

from kdrl_lightning import _moved
from kdrl_lightning.metrics.histograms import Histogram, Histograms
from kdrl_lightning.metrics.memory import peak_gb
from kdrl_lightning.metrics.step_log import StepLog
from kdrl_lightning.metrics.step_stats import StepStats

__all__ = ["Histogram", "Histograms", "StepLog", "StepStats", "peak_gb"]

# Names that modules of 0.1 had here.
__getattr__ = _moved.names_of("kdrl_lightning.evaluation")
