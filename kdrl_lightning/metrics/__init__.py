"""Statistics and histograms of optimizer steps, their log, and a check that steps are finite."""

from kdrl_lightning.common import old_names
from kdrl_lightning.metrics.histograms import Histogram, Histograms
from kdrl_lightning.metrics.memory import peak_gb
from kdrl_lightning.metrics.step_log import StepLog
from kdrl_lightning.metrics.step_stats import StepStats

__all__ = ["Histogram", "Histograms", "StepLog", "StepStats", "peak_gb"]

# Version 0.1 had modules of `evaluation` here; their names still work.
__getattr__ = old_names.names_of("kdrl_lightning.evaluation")
