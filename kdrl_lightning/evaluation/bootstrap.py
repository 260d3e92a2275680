"""How far a mean over prompts may be from that over others of their kind."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def bootstrap_interval(
    values: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean (Efron 1979), drawing prompts with replacement.

    >>> import torch
    >>> bootstrap_interval(torch.ones(8))
    (1.0, 1.0)

    Args:
        values: ``[P]``, one number per prompt, P at least 1.
        level: part of the resampled means that lie inside.
        resamples: how many means are drawn.
        seed: of the draws.
    """
    numbers = values.double().cpu().numpy()
    draws = np.random.default_rng(seed)
    size = len(numbers)
    means = [numbers[draws.integers(size, size=size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)
