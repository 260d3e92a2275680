"""Cut the completions of one optimizer step into micro-batches.

We sort the rows by length and cut them into contiguous parts, so that there is little padding.
Among the cuts with at most one percent more padded tokens than the best one, we take the cut whose
largest part is smallest, because the least padding can put all long rows into one part. A token
limit, which protects memory, comes before both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from math import isinf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher

SLACK = 0.01
OVER_LIMIT = 1e9
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def partition(
    lengths: Sequence[int], parts: int, max_tokens: float = float("inf")
) -> list[list[int]]:
    """Return row indices split into ``parts`` micro-batches.

    Args:
        lengths: number of tokens of each row.
        parts: number of micro-batches, at most the number of rows.
        max_tokens: most tokens of a part, with padding. It is kept if possible: always if it is at
            least ``ceil(rows / parts)`` times the longest row.

    Returns:
        ``parts`` non-empty lists of row indices, shortest rows first.

    Raises:
        ConfigurationError: there are more parts than rows.

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
    ordered = np.asarray(lengths, dtype=np.float64)[order]
    best, bounds = _cheapest_cut(ordered, parts, max_tokens)
    low = max(best / parts, ordered[-1])
    high = max((b - a) * ordered[b - 1] for a, b in pairwise(bounds))
    while high - low > max(1.0, 0.005 * high):
        limit = (low + high) / 2
        total, found = _cheapest_cut(ordered, parts, limit)
        if total <= best * (1 + SLACK):
            high, bounds = limit, found
        else:
            low = limit
    return [order[a:b].tolist() for a, b in pairwise(bounds)]


def teacher_passes(
    parts: Iterable[list[int]],
    batch: RolloutBatch,
    teacher: Teacher | None,
    max_tokens: float,
    reduce: Callable[[Tensor, str], Tensor],
) -> Iterator[list[int]]:
    """Yield the rows of each pass of a teacher, within a limit on the teacher's tokens.

    A row that is longer than the limit gets a separate pass. Score while you iterate: each part
    waits for the alignment of its completions with the teacher's tokens.

    Args:
        parts: lists of rows of ``batch``, within the limit for the student.
        batch: all completions.
        teacher: the teacher, if it reads other tokens than the student; None: parts stay whole.
        max_tokens: most tokens of a pass, with padding.
        reduce: reduces a tensor over ranks by ``sum`` or ``max``. Ranks that score together need
            equally many passes, so a rank with fewer scores a row again.
    """
    for rows in parts:
        if teacher is None or isinf(max_tokens):
            yield rows
            continue
        lengths: list[int] = teacher.lengths(batch.select(rows)).tolist()
        passes = _fewest(lengths, max_tokens)
        yield from ([rows[i] for i in one] for one in passes)
        if teacher.collective:
            most = int(reduce(torch.tensor([float(len(passes))]), "max").item())
            yield from [rows[:1]] * (most - len(passes))


def _fewest(lengths: list[int], max_tokens: float) -> list[list[int]]:
    """Return the fewest parts within the limit; at worst each row alone.

    >>> _fewest([4, 9, 3, 20], 10)
    [[2, 0], [1], [3]]
    """
    for count in range(1, len(lengths)):
        parts = partition(lengths, count, max_tokens)
        sizes = ([lengths[i] for i in part] for part in parts)
        if all(len(size) == 1 or len(size) * max(size) <= max_tokens for size in sizes):
            return parts
    return partition(lengths, len(lengths), max_tokens)


def _cheapest_cut(ordered: Floats, parts: int, limit: float) -> tuple[float, list[int]]:
    """Return the cut with the fewest padded tokens and no part above ``limit``.

    It is found by dynamic programming over the parts.

    Returns:
        The tokens (huge if the limit cannot be kept), and the bounds ``0 .. n`` of the parts.
    """
    n = len(ordered)
    total = _padded(ordered, np.full(n, -1), np.arange(n), limit)
    last_of_previous = []
    for part in range(1, parts):
        total, choice = _add_part(ordered, total, part, limit)
        last_of_previous.append(choice)
    bounds, end = [n], n - 1
    for choice in reversed(last_of_previous):
        end = int(choice[end])
        bounds.append(end + 1)
    return float(total[-1]), [0, *bounds[::-1]]


def _add_part(ordered: Floats, total: Floats, part: int, limit: float) -> tuple[Floats, Ints]:
    """Find where to start one more part, for every row at which that part may end.

    The best start never moves left when the end moves right. So we divide and conquer, and search
    each start between those of two solved ends: ``O(n log n)`` instead of ``O(n^2)``.

    Returns:
        The fewest padded tokens up to each end, and the last row of the part before it.
    """
    ends = len(ordered) - part
    start, value = np.zeros(ends, dtype=np.int64), np.empty(ends)
    step = 1 << (ends.bit_length() - 1)
    while step:
        x = np.arange(step - 1, ends, 2 * step)
        end = part + x
        low = np.where(x >= step, start[np.maximum(x - step, 0)], part - 1)
        high = np.where(x + step < ends, start[np.minimum(x + step, ends - 1)], end - 1)
        size = np.minimum(high, end - 1) - low + 1
        first = np.cumsum(size) - size
        candidate = np.arange(size.sum()) - np.repeat(first - low, size)
        cost = total[candidate] + _padded(ordered, candidate, np.repeat(end, size), limit)
        value[x] = np.minimum.reduceat(cost, first)
        hits = np.flatnonzero(cost == np.repeat(value[x], size))
        start[x] = candidate[hits[np.searchsorted(hits, first)]]
        step >>= 1
    pad = np.zeros(part, dtype=np.int64)
    return np.concatenate([np.full(part, np.inf), value]), np.concatenate([pad, start])


def _padded(ordered: Floats, before: Ints, end: Ints, limit: float) -> Floats:
    """Return padded tokens of rows ``before + 1 .. end``, with a large cost above the limit."""
    tokens = (end - before) * ordered[end]
    return tokens if np.isinf(limit) else tokens + OVER_LIMIT * np.maximum(tokens - limit, 0.0)
