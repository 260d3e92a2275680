"""A random Qwen2 of any vocabulary, with another model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_qwen2(folder: Path, tokenizer_from: str, vocab: int, width: int, **settings: Any) -> None:
    """Write a Hugging Face folder; ``settings`` are fields of transformers' configuration."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **settings,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
