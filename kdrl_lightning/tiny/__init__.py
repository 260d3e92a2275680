"""The embedded task: column addition with written carries, and its teacher and student."""

from kdrl_lightning.tiny.addition import AdditionTraces, ColumnAddition, addition_reward
from kdrl_lightning.tiny.models import TinyModel

__all__ = ["AdditionTraces", "ColumnAddition", "TinyModel", "addition_reward"]
