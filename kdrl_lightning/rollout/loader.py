"""What the trainer iterates over: integers. The data module turns them into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


class IndexLoader:
    """Yields ``0 .. length-1``, each modulo ``modulus``.

    Sized, because Lightning prefetches an unsized loader by one batch, and every rollout would then
    be sampled from weights one optimizer step old. Stateless: what to do at an index follows from
    ``trainer.global_step`` (the state methods tell Lightning that a resume in mid-epoch is fine).
    """

    def __init__(self, length: int, modulus: int | None = None) -> None:
        self.length = length
        self.modulus = modulus or length or 1

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return (i % self.modulus for i in range(self.length))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is ``trainer.global_step``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state."""


def limited(length: int, limit: int | float) -> int:
    """Batches that one of Lightning's ``limit_*_batches`` leaves: a count, or a fraction.

    >>> limited(6, 1000), limited(6, 0.5), limited(6, 1.0)
    (6, 3, 6)
    """
    return min(limit, length) if isinstance(limit, int) else int(length * limit)


def prompt_stream(start: int, count: int, size: int, seed: int) -> list[int]:
    """Rows at positions ``start ..`` of an endless stream of seeded shuffles of ``size`` rows.

    >>> sorted(prompt_stream(0, 4, 4, seed=0))
    [0, 1, 2, 3]
    >>> prompt_stream(0, 6, 4, seed=0)[4:] == prompt_stream(4, 2, 4, seed=0)
    True
    """
    return rows_at(range(start, start + count), size, seed)


def rows_at(positions: Iterable[int], size: int, seed: int) -> list[int]:
    """Rows at any positions of that stream."""
    rows = []
    for position in positions:
        epoch, offset = divmod(position, size)
        rows.append(int(_order(size, epoch, seed)[offset]))
    return rows


@lru_cache(maxsize=2)  # a rollout may lie in two passes
def _order(size: int, epoch: int, seed: int) -> NDArray[np.integer[Any]]:
    order = np.random.default_rng([seed, epoch]).permutation(size)
    return order.astype(np.uint32) if size < 1 << 32 else order  # 4 MB for a million rows
