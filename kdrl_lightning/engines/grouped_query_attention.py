"""Grouped-query attention on a CPU that does not copy the keys and values that query heads share.

If a batch has a mask, transformers' ``sdpa`` repeats keys and values once per query head, for every
new token. torch's CPU kernel reads shared heads in place and gives bit-identical results. We
register it with transformers under a new name, which a model uses while it samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.engines.prefixes import is_ordinary

# `Any`: models of transformers and their settings have no types.

NAME = "kdrl_shared_heads"
REPLACED = "sdpa"


@contextmanager
def shared_heads_in_place(model: HFModel) -> Iterator[None]:
    """Use ``attend`` inside the context, if a model on a CPU has shared heads and ``sdpa``."""
    if not has_copies_to_save(model):
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(REPLACED)


def has_copies_to_save(model: HFModel) -> bool:
    """Return whether ``attend`` would save copies and change nothing else.

    Sparse attention checks for the name ``sdpa``; ``is_ordinary`` leaves such models out.
    """
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    return (
        model.device.type == "cpu"
        and config._attn_implementation == REPLACED
        and getattr(config, "num_key_value_heads", None) not in (None, heads)
        and not config.sub_configs
        and model.is_backend_compatible()
        and is_ordinary(model)
    )


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend as ``sdpa`` does; with a mask, read shared keys and values in place.

    Args:
        module: the layer, from which ``sdpa`` reads how many query heads share a key.
        query: ``[B, H, T, D]``.
        key: ``[B, K, S, D]``, H a multiple of K.
        value: ``[B, K, S, E]``.
        attention_mask: bool, or added to the scores; broadcast to ``[B, H, T, S]``. If None, we
            call ``sdpa``, which then makes no copies.
        dropout: probability with which an attention weight is dropped.
        scaling: factor of the scores; None: ``D ** -0.5``.
        settings: passed on to ``sdpa``, which we also call if they hold a bias or a paged cache.

    Returns:
        ``[B, T, H, E]``, and None in place of the attention weights.
    """
    if attention_mask is None or settings.keys() & {"position_bias", "cache"}:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **settings
        )
        return out
    attended = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
