"""Attention on a CPU that does not copy the keys and values that query heads share.

If a batch has a mask, transformers' ``sdpa`` repeats keys and values once per query head, for every
new token. torch's CPU kernel reads shared heads in place and gives the same numbers, bit by bit. We
register it with transformers under another name and give a model that name while it samples.
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
    """Let a model attend without copies inside, if it has shared heads and ``sdpa`` on a CPU."""
    if not has_copies_to_save(model):
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(REPLACED)


def has_copies_to_save(model: HFModel) -> bool:
    """Whether transformers copies shared keys and values, and another name changes nothing else.

    Sparse attention reads the name ``sdpa`` itself; such layers have caches that are not ordinary.
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
    """Attend as ``sdpa`` does, with keys and values in place if there is a mask.

    Args:
        module: the layer, which ``sdpa`` asks how many query heads share a key.
        query: ``[B, H, T, D]``.
        key: ``[B, K, S, D]``, H a multiple of K.
        value: ``[B, K, S, E]``.
        attention_mask: bool, or added to the scores; broadcast to ``[B, H, T, S]``. Without one,
            ``sdpa`` makes no copies, so it does the work.
        dropout: the share of attention weights that are dropped.
        scaling: of the scores; None: ``D ** -0.5``.
        settings: for ``sdpa``. It also does the work if they hold a bias or a paged cache.

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
