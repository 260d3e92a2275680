"""Prompt sources: sized, indexable, rows are dicts with a ``prompt``."""

from kdrl_lightning.prompts.base import Prompts, PromptSource, encode_prompt
from kdrl_lightning.prompts.jsonl import JSONLPrompts

__all__ = ["JSONLPrompts", "PromptSource", "Prompts", "encode_prompt"]
