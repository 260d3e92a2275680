"""Cuts the rows of a micro-batch into passes of rows of similar length, so that less is padded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

# Padded tokens of a pass, at least: a GPU would not be busy with fewer.
LEAST_TOKENS = 4096
# Share of its padded tokens that cutting a pass in two must save.
LEAST_SAVING = 0.02


class WidthClass(NamedTuple):
    """Rows that run in one pass.

    Attributes:
        rows: their places in the batch.
        width: tokens of the longest one.
    """

    rows: list[int]
    width: int

    @property
    def tokens(self) -> int:
        """Tokens of the pass, with padding."""
        return len(self.rows) * self.width


def width_classes(lengths: Sequence[int]) -> list[WidthClass]:
    """Return the passes for rows of these lengths, shortest rows first.

    A pass is cut in two, where that saves most, until no cut saves enough.

    Args:
        lengths: tokens of each row.

    >>> [c.rows for c in width_classes([2000, 8000, 2100, 7900])], width_classes([5, 9])
    ([[0, 2], [3, 1]], [WidthClass(rows=[0, 1], width=9)])
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends, bounds = [], [0, len(order)]
    while len(bounds) > 1:
        first, last = bounds[0], bounds[1]
        cut = _best_cut([lengths[r] for r in order[first:last]])
        if cut:
            bounds.insert(1, first + cut)
        else:
            ends.append(bounds.pop(0))
    return [WidthClass(order[a:b], lengths[order[b - 1]]) for a, b in pairwise([*ends, len(order)])]


def _best_cut(ascending: list[int]) -> int:
    """Return how many of the shortest rows run by themselves; 0: all run together."""
    n, width = len(ascending), ascending[-1]
    found = {
        i: i * ascending[i - 1] + (n - i) * width
        for i in range(1, n)
        if min(i * ascending[i - 1], (n - i) * width) >= LEAST_TOKENS
    }
    best = min(found, key=found.__getitem__, default=0)
    return best if best and found[best] <= (1 - LEAST_SAVING) * n * width else 0
