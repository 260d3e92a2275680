"""Loaders of integers for the trainer. The data module turns each integer into a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class IndexLoader:
    """Yields ``0 .. length-1``, each modulo ``modulus``.

    It has a length, because Lightning prefetches one batch of a loader without one, and every
    rollout would then come from weights one optimizer step old. It has no state, because
    ``trainer.global_step`` decides what to do at an index; the state methods tell Lightning that a
    run can resume within an epoch.

    Args:
        length: number of integers.
        modulus: integers are taken modulo this; None: they stay as they are.
    """

    def __init__(self, length: int, modulus: int | None = None) -> None:
        self.length = length
        self.modulus = modulus or length or 1

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return (i % self.modulus for i in range(self.length))

    def state_dict(self) -> dict[str, object]:
        """Return an empty state: the position is ``trainer.global_step``."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Ignore the state."""


def limited(length: int, limit: int | float) -> int:
    """Return how many batches one of Lightning's ``limit_*_batches`` leaves.

    Args:
        length: batches without the limit.
        limit: a count as ``int``, or a fraction as ``float``.

    >>> limited(6, 1000), limited(6, 0.5), limited(6, 1.0)
    (6, 3, 6)
    """
    return min(limit, length) if isinstance(limit, int) else int(length * limit)


def prompt_stream(start: int, count: int, size: int, seed: int) -> list[int]:
    """Return ``count`` rows from position ``start`` of an endless stream of seeded shuffles.

    Args:
        start: first position in the stream.
        count: number of rows.
        size: number of rows in a shuffle.
        seed: seed of the shuffles.

    >>> sorted(prompt_stream(0, 4, 4, seed=0))
    [0, 1, 2, 3]
    >>> prompt_stream(0, 6, 4, seed=0)[4:] == prompt_stream(4, 2, 4, seed=0)
    True
    """
    return rows_at(range(start, start + count), size, seed)


def rows_at(positions: Iterable[int], size: int, seed: int) -> list[int]:
    """Return the rows at the given positions of the stream of ``prompt_stream``."""
    rows = []
    for position in positions:
        epoch, offset = divmod(position, size)
        rows.append(int(_order(size, epoch, seed)[offset]))
    return rows


@lru_cache(maxsize=2)  # a rollout can begin in one shuffle and end in the next
def _order(size: int, epoch: int, seed: int) -> NDArray[np.int64] | NDArray[np.uint32]:
    order = np.random.default_rng([seed, epoch]).permutation(size)
    return order.astype(np.uint32) if size < 1 << 32 else order  # 4 MB for a million rows
