"""The embedded task: column addition with written carries, and its small models."""

from kdrl_lightning.tiny.addition import AdditionTraces, ColumnAddition, addition_reward
from kdrl_lightning.tiny.feedback import AdditionFeedback
from kdrl_lightning.tiny.models import TinyModel
from kdrl_lightning.tiny.verifier import ErringVerifier

__all__ = [
    "AdditionFeedback",
    "AdditionTraces",
    "ColumnAddition",
    "ErringVerifier",
    "TinyModel",
    "addition_reward",
]
