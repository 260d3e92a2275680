"""Teachers: local, on servers, cached, routed, with their own prompt, and self-teachers."""

from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.cached import CachedTeacher
from kdrl_lightning.teachers.cross_tokenizer.teacher import CrossTokenizerTeacher
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
from kdrl_lightning.teachers.self_teachers import (
    HardSync,
    InitialWeights,
    LiveWeights,
    MovingAverage,
    SelfTeacher,
    TrustRegion,
)
from kdrl_lightning.teachers.self_teachers.adapter_off import AdapterOffTeacher
from kdrl_lightning.teachers.server import ServerTeacher

__all__ = [
    "AdapterOffTeacher",
    "CachedTeacher",
    "ColumnContext",
    "Context",
    "CrossTokenizerTeacher",
    "FeedbackContext",
    "FixedContext",
    "HardSync",
    "InitialWeights",
    "JoinedContext",
    "LiveWeights",
    "LocalTeacher",
    "MovingAverage",
    "OtherProblemContext",
    "PromptedTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "ServerTeacher",
    "SiblingContext",
    "Teacher",
    "TeacherPrompt",
    "TrustRegion",
]
