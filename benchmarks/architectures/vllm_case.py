"""Does vLLM sample from a student of an architecture, with the student's own log-probabilities?

    OMP_NUM_THREADS=1 python -m benchmarks.architectures.vllm_case qwen3 mixtral smollm3

writes ``docs/architectures/vllm.json``, a process per family. All in float32, on random weights:

1. The engine's log-probabilities of what it samples are those of the model's own logits.
2. They are so again when all weights have changed and were pushed; before the push they are not.
3. The student gives the same numbers, bit for bit, as before the engine was there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
RESULTS = Path(__file__).parents[2] / "docs/architectures/vllm.json"
END, PAD = 1, 0
PROMPTS = [[5, 9, 13, 4, 15], [7], [3, 14, 3, 3], [12, 11, 10] * 5]
SEEDS = [[100 * i + j for j in range(3)] for i in range(len(PROMPTS))]
BOUND, MOVED = 1e-4, 1e-3

# vLLM's CPU kernels take heads of 32, 64, 80, ... values.
WIDE = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim"], 128),
    **dict.fromkeys(["head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"], 32),
    **dict.fromkeys(["query_pre_attn_scalar", "kv_channels"], 32),
}
# What a folder of the hub names and transformers' defaults leave out.
SPECIAL: dict[str, dict[str, Any]] = {"glm4_moe": {"head_dim": 32}}


class WrongError(AssertionError):
    """Numbers that are not the student's."""


def settings(model_type: str) -> dict[str, Any]:
    """Return the sizes that vLLM's kernels need, as far as the type knows them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[model_type]().to_dict()
    wide = {name: size for name, size in WIDE.items() if name in known}
    return wide | SPECIAL.get(model_type, {})


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """``[T]``: of a completion's tokens by the model's own logits, each row alone."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    chosen = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return chosen.gather(1, torch.tensor(completion)[:, None])[:, 0]


def gap(model: Any, groups: list[list[Any]]) -> float:
    """Return the largest difference of the engine's log-probabilities from the model's."""
    rows = [(p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group]
    return max(
        float((torch.tensor(c.logprobs) - logprobs(model, p, c.ids)).abs().max()) for p, c in rows
    )


def check(model_type: str) -> str:
    """Try an architecture in this process, which must have no engine yet.

    Returns:
        ``yes``, or ``refused: `` and the reason.

    Raises:
        WrongError: numbers are not the student's.
    """
    os.environ.update(ENVIRONMENT)
    from benchmarks.architectures.families import save
    from kdrl_lightning.errors import ConfigurationError, TrainingStopped
    from kdrl_lightning.models import load_causal_lm
    from kdrl_lightning.rollout import Sampling, VLLMEngine
    from kdrl_lightning.weights import ModelWeights

    with tempfile.TemporaryDirectory() as folder:
        path = save(model_type, folder, **settings(model_type))
        try:
            model = load_causal_lm(path)
            engine, weights = VLLMEngine(None, 64, kv_cache_memory_bytes=64 << 20), None
        except ConfigurationError as error:
            return f"refused: {error}"
    return ""
