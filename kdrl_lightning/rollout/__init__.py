"""From prompts to rollout batches: engines, sampling order, and the cut into micro-batches."""

from kdrl_lightning.rollout.engine import Completion, RolloutEngine, Sampling
from kdrl_lightning.rollout.transformers_engine import TransformersEngine
from kdrl_lightning.rollout.vllm_engine import VLLMEngine
from kdrl_lightning.rollout.vllm_server import VLLMServerEngine
from kdrl_lightning.rollout.vllm_teacher import VLLMTeacherEngine

__all__ = [
    "Completion",
    "RolloutEngine",
    "Sampling",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "VLLMTeacherEngine",
]
