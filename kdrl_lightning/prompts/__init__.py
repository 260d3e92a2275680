"""Prompt sources: sized, indexable, rows are dicts with a ``prompt``."""

from kdrl_lightning.prompts.base import (
    EncodedPrompt,
    Prompts,
    PromptSource,
    encode_all,
    encode_prompt,
)
from kdrl_lightning.prompts.jsonl import JSONLPrompts

__all__ = [
    "EncodedPrompt",
    "JSONLPrompts",
    "PromptSource",
    "Prompts",
    "encode_all",
    "encode_prompt",
]
