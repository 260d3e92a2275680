"""Frozen teachers: in this process, on servers, cached, routed, or with a prompt of their own."""

from kdrl_lightning.teachers.adapter_off import AdapterOffTeacher
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.cached import CachedTeacher
from kdrl_lightning.teachers.cross_tokenizer import CrossTokenizerTeacher
from kdrl_lightning.teachers.local import LocalTeacher
from kdrl_lightning.teachers.own_prompt.contexts import (
    ColumnContext,
    Context,
    FeedbackContext,
    FixedContext,
    JoinedContext,
    OtherProblemContext,
    SiblingContext,
)
from kdrl_lightning.teachers.own_prompt.prompt import TeacherPrompt
from kdrl_lightning.teachers.own_prompt.teacher import PromptedTeacher
from kdrl_lightning.teachers.routed import RoutedTeacher
from kdrl_lightning.teachers.server import ServerTeacher

__all__ = [
    "AdapterOffTeacher",
    "CachedTeacher",
    "ColumnContext",
    "Context",
    "CrossTokenizerTeacher",
    "FeedbackContext",
    "FixedContext",
    "JoinedContext",
    "LocalTeacher",
    "OtherProblemContext",
    "PromptedTeacher",
    "RoutedTeacher",
    "ServerTeacher",
    "SiblingContext",
    "Teacher",
    "TeacherPrompt",
]
