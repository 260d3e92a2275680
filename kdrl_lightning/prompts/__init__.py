"""Prompt sources: sized sequences of rows, which are dicts with a ``prompt``."""

from kdrl_lightning.prompts.base import (
    EncodedPrompt,
    Prompts,
    PromptSource,
    encode_all,
    encode_prompt,
)
from kdrl_lightning.prompts.columns.parsed import ParsedPrompts
from kdrl_lightning.prompts.hugging_face import HFPrompts, StreamedHFPrompts
from kdrl_lightning.prompts.jsonl import JSONLPrompts
from kdrl_lightning.prompts.knights import KnightsAndKnavesPrompts
from kdrl_lightning.prompts.mixed import MixedPrompts
from kdrl_lightning.prompts.reasoning_gym import ReasoningGymPrompts

__all__ = [
    "EncodedPrompt",
    "HFPrompts",
    "JSONLPrompts",
    "KnightsAndKnavesPrompts",
    "MixedPrompts",
    "ParsedPrompts",
    "PromptSource",
    "Prompts",
    "ReasoningGymPrompts",
    "StreamedHFPrompts",
    "encode_all",
    "encode_prompt",
]
