"""Cut the completions of one optimizer step into micro-batches.

Sorted by length and cut into contiguous parts, so that little is padded; the cut is the one with
the smallest largest part whose padding stays within one percent of the least possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kdrl_lightning.errors import ConfigurationError

SLACK = 0.01


def partition(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Split row indices into ``parts`` micro-batches.

    Args:
        lengths: tokens of each row.
        parts: number of micro-batches, at most the number of rows.

    Returns:
        ``parts`` non-empty lists of row indices, shortest rows first.

    Raises:
        ConfigurationError: more parts than rows.

    >>> partition([9, 1, 1, 1, 8, 1], 2)
    [[1, 2, 3, 5], [4, 0]]
    """
    if parts > len(lengths):
        raise ConfigurationError(
            f"`accumulate_grad_batches` must be at most the completions of one optimizer step on "
            f"one process, {len(lengths)}: got {parts}. Lower it, or sample more completions."
        )
    order = np.argsort(np.asarray(lengths), kind="stable")
    if parts == 1:
        return [order.tolist()]
    cost = _cost(np.asarray(lengths)[order])
    best, _ = _cheapest_cut(cost, parts, np.inf)
    allowed = best + SLACK * best
    low, high = float(cost.diagonal().max()), float(cost[0, -1])
    cuts = _cheapest_cut(cost, parts, np.inf)[1]
    while high - low > max(1.0, 0.005 * high):
        limit = (low + high) / 2
        total, found = _cheapest_cut(cost, parts, limit)
        if total <= allowed:
            high, cuts = limit, found
        else:
            low = limit
    bounds = [0, *cuts, len(order)]
    return [order[a:b].tolist() for a, b in pairwise(bounds)]


def _cost(ordered: NDArray[np.int64]) -> NDArray[np.float64]:
    """``cost[i, j]``: padded tokens of a part that holds the sorted rows i..j."""
    n = len(ordered)
    count = np.arange(n)[None, :] - np.arange(n)[:, None] + 1
    return np.where(count > 0, count * ordered[None, :].astype(np.float64), np.inf)


def _cheapest_cut(cost: NDArray[np.float64], parts: int, limit: float) -> tuple[float, list[int]]:
    """Least padded tokens with no part above ``limit``, by dynamic programming."""
    allowed = np.where(cost <= limit, cost, np.inf)
    n = len(cost)
    total = allowed[0]
    steps = []
    for _ in range(parts - 1):
        # through[i, j]: the last part starts at row i + 1 and ends at row j.
        through = total[: n - 1, None] + allowed[1:, :]
        steps.append(through.argmin(0))
        total = through.min(0)
    cuts: list[int] = []
    end = n - 1
    for choice in reversed(steps):
        end = int(choice[end])
        cuts.append(end + 1)
    return float(total[-1]), cuts[::-1]
