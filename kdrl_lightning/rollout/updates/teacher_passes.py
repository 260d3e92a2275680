"""Cuts micro-batches for a teacher that reads more tokens than the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import isinf

import torch
from torch import Tensor

from kdrl_lightning.rollout.updates.partition import partition
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher


def teacher_passes(
    parts: Iterable[list[int]],
    batch: RolloutBatch,
    teacher: Teacher | None,
    max_tokens: float,
    reduce: Callable[[Tensor, str], Tensor],
) -> Iterator[list[int]]:
    """Yield the rows of each pass of a teacher, within a limit that counts its own tokens.

    A row that is longer than the limit is a pass of its own. Each part is asked for only when the
    one before it was scored, because its completions may still be aligned.

    Args:
        parts: lists of rows of ``batch``, within the limit for the student.
        batch: all completions.
        teacher: the teacher, if it reads other tokens than the student; None: parts stay.
        max_tokens: most tokens of a pass, with padding.
        reduce: reduces a tensor over ranks by ``sum`` or ``max``. Ranks that score together need
            equally many passes, so some may score a row again.
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
    """Return the fewest parts within the limit, or each row alone.

    >>> _fewest([4, 9, 3, 20], 10)
    [[2, 0], [1], [3]]
    """
    for count in range(1, len(lengths)):
        parts = partition(lengths, count, max_tokens)
        sizes = ([lengths[i] for i in part] for part in parts)
        if all(len(size) == 1 or len(size) * max(size) <= max_tokens for size in sizes):
            return parts
    return partition(lengths, len(lengths), max_tokens)
