"""Stopping on all processes where one has to stop, so that none waits for another for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from kdrl_lightning.errors import TrainingStopped

T = TypeVar("T")


def stop_together(work: Callable[[], T], reduce: Callable[[Tensor, str], Tensor]) -> T:
    """Run ``work`` (without collectives); if it stops anywhere, stop everywhere.

    Args:
        work: may raise on some ranks only.
        reduce: ``(tensor, "sum") -> tensor`` over ranks.

    Raises:
        TrainingStopped: where ``work`` did not raise, but did on another rank.
    """
    result: list[T] = []
    reason: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        reason = error
    stopped = reduce(torch.tensor([float(reason is not None)]), "sum")
    if reason is not None:
        raise reason
    if float(stopped):
        raise TrainingStopped("another process had to stop: its message says why.")
    return result[0]


def require_finite(teacher_logprobs: Tensor | None, tokens: int) -> None:
    """Refuse a teacher that gives NaN or infinite values.

    Raises:
        TrainingStopped: some of the values are not finite.
    """
    if teacher_logprobs is not None and not bool(teacher_logprobs.isfinite().all()):
        raise TrainingStopped(
            f"the teacher's log-probabilities must be finite: got "
            f"{int((~teacher_logprobs.isfinite()).sum())} NaN or infinite of {tokens}. "
            "Check its weights and dtype."
        )


def require_embedded(ids: Tensor, rows: int) -> None:
    """Refuse a teacher's tokens that the student has no embedding for.

    Raises:
        TrainingStopped: an id is beyond the student's ``rows``.
    """
    highest = int(ids.max()) if ids.numel() else -1
    if highest >= rows:
        raise TrainingStopped(
            f"the teacher's completions must be of the student's {rows} tokens: got {highest}. "
            "Take a teacher with the student's vocabulary."
        )
