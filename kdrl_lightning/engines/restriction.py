"""Limits the tokens that an evaluation samples from: min-p, top-k and top-p."""

from __future__ import annotations

import math

from torch import Tensor

from kdrl_lightning.engines.base import Sampling


def restricted(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits with -inf for tokens that ``sampling`` leaves out, as vLLM does.

    The limits apply in this order: ``min_p`` (arXiv 2407.01082), ``top_k``, and ``top_p`` (nucleus
    sampling, arXiv 1904.09751) to what is left. The most likely token always stays, and so do
    tokens that tie with the last one that ``top_k`` keeps.

    >>> import torch
    >>> restricted(torch.tensor([[0.5, 0.3, 0.2]]).log(), Sampling(8, top_p=0.7)).exp()
    tensor([[0.5000, 0.3000, 0.0000]])

    Args:
        logits: ``[R, V]``, divided by the temperature.
        sampling: ``min_p``, ``top_k`` and ``top_p``.

    Returns:
        ``[R, V]``.
    """
    if sampling.min_p > 0.0:
        least = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1.0:
        ordered, places = logits.sort(-1)
        # Counting from the least likely token, leave out those that sum to at most 1 - top_p.
        tail = ordered.double().softmax(-1).cumsum(-1) <= 1.0 - sampling.top_p
        tail[:, -1] = False
        logits = logits.masked_fill(tail.scatter(-1, places, tail), -math.inf)
    return logits
