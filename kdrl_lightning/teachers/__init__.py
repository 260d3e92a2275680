"""Frozen teachers behind one protocol."""

from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.local import LocalTeacher

__all__ = ["LocalTeacher", "Teacher"]
