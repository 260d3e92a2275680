"""Engines that sample completions with the weights of the student or the teacher."""

from kdrl_lightning.engines.base import Completion, RolloutEngine, Sampling
from kdrl_lightning.engines.transformers_engine import TransformersEngine
from kdrl_lightning.engines.vllm.engine import VLLMEngine
from kdrl_lightning.engines.vllm.server import VLLMServerEngine
from kdrl_lightning.engines.vllm.teacher import VLLMTeacherEngine

__all__ = [
    "Completion",
    "RolloutEngine",
    "Sampling",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "VLLMTeacherEngine",
]
