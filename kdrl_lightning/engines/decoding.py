"""Attention of one new token to all that came before it, on a CPU.

Written by hand because transformers' ``sdpa`` copies keys and values once per query head where a
mask is given and heads share them, and torch's kernel spends most of its time per head, not per
key: two batched products take half of that, a third with shared heads (docs/speed.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa"
TYPES = (torch.float32, torch.float64)  # in 16 bits torch's kernel keeps wider scores


@contextmanager
def one_token_attention() -> Iterator[None]:
    """Let models with transformers' ``sdpa`` attention use it for a single query, inside."""
    plain = ALL_ATTENTION_FUNCTIONS[NAME]
    if plain is not sdpa_attention_forward:  # somebody's own
        yield
        return

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        special = any(settings.get(name) is not None for name in ("position_bias", "cache"))
        if query.shape[2] > 1 or query.device.type != "cpu" or query.dtype not in TYPES or special:
            out: tuple[Tensor, None] = plain(module, query, key, value, attention_mask, **settings)
            return out
        return one_token(query, key, value, attention_mask, settings.get("scaling")), None

    ALL_ATTENTION_FUNCTIONS[NAME] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[NAME] = plain


def one_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None
) -> Tensor:
    """Attend.

    Args:
        query: ``[B, H, 1, D]``.
        key: ``[B, K, S, D]``, H a multiple of K.
        value: ``[B, K, S, E]``.
        mask: bool, or added to the scores; broadcast to ``[B, 1, 1, S]``.
        scaling: of the scores; None: ``D ** -0.5``.

    Returns:
        ``[B, 1, H, E]``.
    """
    rows, heads, _, width = query.shape
    shared = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows, shared, heads // shared, width) * scale
    scores = grouped @ key.transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ value).view(rows, 1, heads, value.shape[-1])
