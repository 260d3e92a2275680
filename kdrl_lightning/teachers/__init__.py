"""Teachers: in this process, on servers, cached on disk, several with routing, or the student."""

from kdrl_lightning.teachers.adapter_off import AdapterOffTeacher
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.cached import CachedTeacher
from kdrl_lightning.teachers.local import LocalTeacher
from kdrl_lightning.teachers.routed import RoutedTeacher
from kdrl_lightning.teachers.self_teachers import (
    HardSync,
    InitialWeights,
    LiveWeights,
    MovingAverage,
    SelfTeacher,
    TrustRegion,
)
from kdrl_lightning.teachers.server import ServerTeacher

__all__ = [
    "AdapterOffTeacher",
    "CachedTeacher",
    "HardSync",
    "InitialWeights",
    "LiveWeights",
    "LocalTeacher",
    "MovingAverage",
    "RoutedTeacher",
    "SelfTeacher",
    "ServerTeacher",
    "Teacher",
    "TrustRegion",
]
