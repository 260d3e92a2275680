"""Bootstrap interval of a mean over prompts."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def bootstrap_interval(
    values: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return a percentile interval of the mean over prompts (bootstrap, Efron 1979).

    Prompts are drawn with replacement. If all values are 0, or all are 1, every draw is the same,
    and the bootstrap would claim certainty; we then return Clopper and Pearson's interval (1934).

    >>> import torch
    >>> low, high = bootstrap_interval(torch.ones(8))
    >>> round(low, 3), high
    (0.631, 1.0)

    Args:
        values: ``[P]``, one number per prompt, P at least 1.
        level: share of the resampled means that lie in the interval.
        resamples: number of resampled means.
        seed: seed of the draws.

    Returns:
        The lower and the upper end of the interval.
    """
    numbers = values.double().cpu().numpy()
    draws = np.random.default_rng(seed)
    size = len(numbers)
    for certain in (0.0, 1.0):
        if (numbers == certain).all():
            far = 1.0 - ((1.0 - level) / 2.0) ** (1.0 / size)
            return (0.0, far) if certain == 0.0 else (1.0 - far, 1.0)
    means = [numbers[draws.integers(size, size=size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)
