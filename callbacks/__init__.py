"""Callbacks: schedules, statistics, checks, health, checkpoints, progress, report, samples."""

from kdrl_lightning.callbacks import weight_sync_check
from kdrl_lightning.callbacks.base import RolloutCallback
from kdrl_lightning.callbacks.checkpoint import FSDPCheckpoint
from kdrl_lightning.callbacks.imitation_stats import SelectiveImitationStats
from kdrl_lightning.callbacks.predictions import PredictionWriter
from kdrl_lightning.callbacks.progress import RolloutProgress
from kdrl_lightning.callbacks.report import RunReport
from kdrl_lightning.callbacks.samples import SamplePage
from kdrl_lightning.callbacks.schedules.adaptive_entropy import AdaptiveEntropy
from kdrl_lightning.callbacks.schedules.coefficient_schedule import (
    CoefficientSchedule,
    KLCoefficientAnnealing,
)
from kdrl_lightning.callbacks.step_profile import StepProfile
from kdrl_lightning.callbacks.teacher_health import TeacherHealth
from kdrl_lightning.callbacks.threads import CPUThreads
from kdrl_lightning.callbacks.weight_sync_check import WeightSyncCheck

__all__ = [
    "AdaptiveEntropy",
    "CPUThreads",
    "CoefficientSchedule",
    "FSDPCheckpoint",
    "KLCoefficientAnnealing",
    "PredictionWriter",
    "RolloutCallback",
    "RolloutProgress",
    "RunReport",
    "SamplePage",
    "SelectiveImitationStats",
    "StepProfile",
    "TeacherHealth",
    "WeightSyncCheck",
]


def __getattr__(name: str) -> type[WeightSyncCheck]:
    if name == "WeightSync":  # its name in 0.1
        return weight_sync_check.__getattr__(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
