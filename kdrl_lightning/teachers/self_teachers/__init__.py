"""Self-teachers: the student's weights, earlier or current ones, score its completions."""

from kdrl_lightning.teachers.self_teachers.found import (
    KEPT,
    check_self_teachers,
    drop_kept,
    kinds_of_self,
    self_teachers,
)
from kdrl_lightning.teachers.self_teachers.rules import (
    HardSync,
    InitialWeights,
    LiveWeights,
    MovingAverage,
    TrustRegion,
    WeightRule,
)
from kdrl_lightning.teachers.self_teachers.steps import SelfTeacherSteps
from kdrl_lightning.teachers.self_teachers.teacher import SelfTeacher

__all__ = [
    "KEPT",
    "HardSync",
    "InitialWeights",
    "LiveWeights",
    "MovingAverage",
    "SelfTeacher",
    "SelfTeacherSteps",
    "TrustRegion",
    "WeightRule",
    "check_self_teachers",
    "drop_kept",
    "kinds_of_self",
    "self_teachers",
]
