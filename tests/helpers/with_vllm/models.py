"""Random models of several architectures, with heads that vLLM's CPU kernels take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from kdrl_lightning.engines import Completion
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.rollout_batch import collate

PAD, EOS, CONTEXT = 0, 1, 512
CASES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
}


def make_model(name: str, seed: int, spread: float = 0.2) -> Any:
    """Return a random float32 model; ``spread`` is the standard deviation of its weights."""
    family, own = CASES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=spread,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        **own,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def save_model(name: str, folder: Path, seed: int = 0) -> str:
    model = make_model(name, seed)
    model.save_pretrained(folder)
    return str(folder)


def worst_gap(
    model: Any, prompts: list[list[int]], groups: list[list[Completion]], temperature: float = 1.0
) -> float:
    """Return the largest difference of the engine's log-probabilities from the trainer's."""
    rows = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    batch = collate(
        [p for p, _ in rows],
        [c.ids for _, c in rows],
        [0] * len(rows),
        pad_id=PAD,
        rollout_logprobs=[c.logprobs for _, c in rows],
    ).replace(temperature=temperature)
    with torch.no_grad():
        scores = Scorer(model).score(batch)
    assert batch.rollout_logprobs is not None
    return float((batch.rollout_logprobs - scores.logprobs).abs().max())
