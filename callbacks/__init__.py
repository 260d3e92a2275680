"""Callbacks: annealing, statistics, sync check, progress, and the report of a run."""

from kdrl_lightning.callbacks.imitation_stats import SelectiveImitationStats
from kdrl_lightning.callbacks.kl_annealing import KLCoefficientAnnealing
from kdrl_lightning.callbacks.progress import RolloutProgress
from kdrl_lightning.callbacks.report import RunReport
from kdrl_lightning.callbacks.schedule import CoefficientSchedule
from kdrl_lightning.callbacks.threads import CPUThreads
from kdrl_lightning.callbacks.weight_sync import WeightSync

__all__ = [
    "CPUThreads",
    "CoefficientSchedule",
    "KLCoefficientAnnealing",
    "RolloutProgress",
    "RunReport",
    "SelectiveImitationStats",
    "WeightSync",
]
