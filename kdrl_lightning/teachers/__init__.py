"""Frozen teachers: in this process, on servers, cached on disk, or several with routing."""

from kdrl_lightning.teachers.adapter_off import AdapterOffTeacher
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.cached import CachedTeacher
from kdrl_lightning.teachers.cross_tokenizer import CrossTokenizerTeacher
from kdrl_lightning.teachers.local import LocalTeacher
from kdrl_lightning.teachers.routed import RoutedTeacher
from kdrl_lightning.teachers.server import ServerTeacher

__all__ = [
    "AdapterOffTeacher",
    "CachedTeacher",
    "CrossTokenizerTeacher",
    "LocalTeacher",
    "RoutedTeacher",
    "ServerTeacher",
    "Teacher",
]
