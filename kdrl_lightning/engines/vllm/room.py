"""Checks, before models load, that the engine's part of the GPU has room for the model."""

from __future__ import annotations

import math

import torch

from kdrl_lightning.engines.cache_budget import token_bytes
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import skeleton_causal_lm


def needed_bytes(path: str, dtype: torch.dtype, context: int, cache: int | None) -> int:
    """Return the bytes of a model's weights and of its KV cache, by default for one row.

    Args:
        path: folder or hub name of the model.
        dtype: dtype of weights and cache.
        context: longest prompt and completion together, in tokens.
        cache: size of the cache in bytes; None: that of one row of ``context`` tokens.
    """
    model = skeleton_causal_lm(path)
    weights: int = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return weights + (cache or context * token_bytes(model.config, dtype))


def check_room(
    path: str,
    dtype: torch.dtype,
    context: int,
    cache: int | None,
    share: float,
    device: torch.device,
) -> None:
    """Check that the engine's part of the GPU has room for the weights and the KV cache.

    Args:
        path: folder or hub name of the model.
        dtype: dtype of weights and cache.
        context: longest prompt and completion together, in tokens.
        cache: size of the cache in bytes; None: that of one row of ``context`` tokens.
        share: the engine's fraction of the GPU's memory, in (0, 1].
        device: the GPU.

    Raises:
        ConfigurationError: the engine has too little room.
    """
    total = torch.cuda.mem_get_info(device)[1]
    needed = needed_bytes(path, dtype, context, cache)
    if needed <= share * total:
        return
    least = math.ceil(100 * needed / total) / 100
    cure = f"Set at least {least:g}, or"
    if least >= 1.0:
        cure = "This GPU is too small:"
    raise ConfigurationError(
        f"`gpu_memory_utilization` must give the engine {needed / 1e9:.3g} GB, for the weights of "
        f"{path} and the cache of a row of {context} tokens: got {share:g}, which is "
        f"{share * total / 1e9:.3g} of {total / 1e9:.3g} GB. {cure} sample on another GPU with "
        "VLLMServerEngine."
    )
