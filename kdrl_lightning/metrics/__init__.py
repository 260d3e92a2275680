"""Metrics: pass@1 for evaluation, and statistics summed over one optimizer step."""

from kdrl_lightning.metrics.pass_at_1 import PassAt1
from kdrl_lightning.metrics.step_stats import StepStats

__all__ = ["PassAt1", "StepStats"]
