"""Computes how many rows of a given length fit into a KV cache."""

from __future__ import annotations

import torch

from kdrl_lightning.common.untyped import HFConfig, HFModel

# A full cache grows by a quarter.
GROWTH = 1.25
# Bytes per logit of a row while a token is drawn: two copies in float32, the cumulative
# distribution in float64 for the row and for its completion, and the model's output.
DRAW = 28
# The part of a GPU's free memory that a cache may take; the rest is for activations.
SHARE = 0.5
CPU_BYTES = 4 << 30
CPU_SEQUENCES = 256


def token_bytes(config: HFConfig, dtype: torch.dtype) -> int:
    """Return an upper bound on the bytes of one token's keys and values in all layers.

    Layers with a sliding window or a recurrent state need less.

    Args:
        config: configuration of the model.
        dtype: dtype of the cache.
    """
    text = config.get_text_config()

    def named(*names: str) -> int:
        return max((int(getattr(text, name, None) or 0) for name in names), default=0)

    heads = named("num_key_value_heads") or named("num_attention_heads") or 1
    width = named("head_dim", "qk_head_dim", "v_head_dim")
    width = width or named("hidden_size") // (named("num_attention_heads") or 1)
    return 2 * max(named("num_hidden_layers"), 1) * heads * max(width, 1) * dtype.itemsize


class CacheBudget:
    """Limits how many rows are decoded at once, by the memory of their KV cache.

    Args:
        max_tokens: tokens in the cache at once, prompts included; None: as many as fit into half of
            the GPU's free memory, or into 4 GiB on a CPU.
        max_rows: rows at once; None: no limit on a GPU, 256 on a CPU.
    """

    def __init__(self, max_tokens: int | None, max_rows: int | None) -> None:
        self.max_tokens = max_tokens
        self.max_rows = max_rows

    def rows(self, model: HFModel, lengths: list[int]) -> list[int]:
        """Return how many rows of each length may be decoded at once, at least 1.

        Args:
            model: the model that decodes.
            lengths: longest prompt and completion together, in tokens.
        """
        head = model.get_output_embeddings().weight
        on_cpu = head.device.type == "cpu"
        memory = free_bytes(head.device)
        return self.rows_in(memory, model.config, head.dtype, len(head), lengths, on_cpu)

    def rows_in(
        self,
        memory: float,
        config: HFConfig,
        dtype: torch.dtype,
        vocabulary: int,
        lengths: list[int],
        on_cpu: bool,
    ) -> list[int]:
        """Return what ``rows`` returns, from given memory and configuration.

        Args:
            memory: bytes that the cache may take.
            config: configuration of the model.
            dtype: dtype of the cache.
            vocabulary: number of rows of the model's head.
            lengths: longest prompt and completion together, in tokens.
            on_cpu: whether the model decodes on a CPU.
        """
        most = self.max_rows or (CPU_SEQUENCES if on_cpu else max(vocabulary, 1))
        if self.max_tokens is not None:
            found = [self.max_tokens // length for length in lengths]
        else:
            each = GROWTH * token_bytes(config, dtype)
            found = [int(memory / (length * each + DRAW * vocabulary)) for length in lengths]
        return [max(1, min(most, rows)) for rows in found]


def free_bytes(device: torch.device) -> float:
    """Return the bytes that a cache may take on a device."""
    if device.type != "cuda":
        return CPU_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return SHARE * (torch.cuda.mem_get_info(device)[0] + unused)
