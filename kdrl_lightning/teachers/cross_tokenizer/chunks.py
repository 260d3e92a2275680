"""Cuts two token sequences of the same texts into minimal chunks with common byte boundaries."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]


class Cut(NamedTuple):
    """The chunk of each token of one side, flat over all rows.

    Attributes:
        numbers: ``[N]``, the number of a token's chunk within its row; the row's number of chunks
            for tokens after its last common boundary.
        places: ``[N]``, how many tokens of its chunk precede a token.
        whole: ``[N]`` bool: the token is in a chunk, not after the last common boundary.
        chunks: ``[N]``, number of the token's chunk over all rows; only if ``whole``.
    """

    numbers: Ints
    places: Ints
    whole: Bools
    chunks: Ints


def cut(ours: Ints, our_rows: Ints, theirs: Ints, their_rows: Ints) -> tuple[Cut, Cut]:
    """Cut both sides at all bytes at which a token of each ends.

    Time and memory are linear in tokens and bytes, not in the product of both lengths.

    Args:
        ours: ``[N]`` bytes of each token of one side, all rows one after another.
        our_rows: ``[R]`` tokens of each row.
        theirs: ``[M]`` bytes of each token of the other side.
        their_rows: ``[R]`` tokens of each row.

    Example: ``ab|c|d`` and ``a|bc|d`` share the boundaries after c and after d::

        >>> one, two = cut(np.array([2, 1, 1]), np.array([3]), np.array([1, 2, 1]), np.array([3]))
        >>> one.numbers.tolist(), one.places.tolist(), two.numbers.tolist()
        ([0, 0, 1], [0, 1, 0], [0, 0, 1])
    """
    first, second = _within(ours, our_rows), _within(theirs, their_rows)
    # Each row gets its own range of bytes, with one spare byte so that no two rows touch.
    size = np.maximum(_totals(ours, our_rows), _totals(theirs, their_rows)) + 1
    base = np.cumsum(size) - size
    first += np.repeat(base, our_rows)
    second += np.repeat(base, their_rows)
    total = int(size.sum())
    shared = _marks(first, total) & _marks(second, total)
    return _cut(first, our_rows, shared), _cut(second, their_rows, shared)


def _cut(ends: Ints, rows: Ints, shared: Bools) -> Cut:
    """Return the chunks of one side: a chunk closes with the last token that ends at its byte."""
    closing = shared[ends]
    closing[:-1] &= ends[:-1] != ends[1:]  # a token without bytes belongs to the chunk before it
    before: Ints = np.cumsum(closing) - closing
    starts = np.cumsum(rows) - rows
    per_row = _totals(closing.astype(np.int64), rows)
    first = np.cumsum(per_row) - per_row  # number of a row's first chunk
    numbers = before - np.repeat(first, rows)
    opens = np.ones(len(ends), bool)
    opens[1:] = closing[:-1]
    opens[starts[rows > 0]] = True
    here = np.arange(len(ends))
    places = here - np.maximum.accumulate(np.where(opens, here, 0)) if len(ends) else here
    return Cut(numbers, places, numbers < np.repeat(per_row, rows), before)


def _within(lengths: Ints, rows: Ints) -> Ints:
    """Return the byte at which each token ends, counted from its row's start."""
    ends = np.cumsum(lengths)
    totals = _totals(lengths, rows)
    out: Ints = ends - np.repeat(np.cumsum(totals) - totals, rows)
    return out


def _totals(values: Ints, rows: Ints) -> Ints:
    """Return the sum of each row's values."""
    ends = np.concatenate([[0], np.cumsum(values)])
    stops = np.cumsum(rows)
    out: Ints = ends[stops] - ends[stops - rows]
    return out


def _marks(ends: Ints, total: int) -> Bools:
    marks = np.zeros(total, bool)
    marks[ends] = True
    return marks
