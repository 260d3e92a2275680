"""Re-encodes the teacher's completions in the student's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kdrl_lightning.engines.base import Completion
from kdrl_lightning.teachers.cross_tokenizer.aligner import Aligner, Chunked
from kdrl_lightning.teachers.cross_tokenizer.token_bytes import TokenBytes


class Translator:
    """Re-encodes completions that the teacher sampled, as the student's tokenizer writes them.

    Args:
        teacher: the teacher's vocabulary.
        student: the student's.
        ends: tokens that end a completion of the teacher.
    """

    def __init__(self, teacher: TokenBytes, student: TokenBytes, ends: Sequence[int]) -> None:
        self._aligner = Aligner(teacher, student, ends)

    def __call__(
        self, completions: Sequence[Completion], ends: Sequence[int], most: int
    ) -> tuple[list[Completion], int]:
        """Return completions in the student's tokens, and how many of them are cut short.

        If the student's tokens cannot write all of a completion within ``most``, the student gets
        its beginning, marked as truncated.

        Args:
            completions: in the teacher's tokens, with their log-probabilities.
            ends: the student's end token of each completion.
            most: maximum number of tokens of a completion.
        """
        rows = self._aligner(
            [np.array(c.ids, np.int64) for c in completions], ends, [most] * len(completions)
        )
        whole = [bool((row.places >= 0).all()) for row in rows]
        made = [
            replace(
                c,
                ids=row.teacher_ids.tolist(),
                logprobs=_shared(row, c.logprobs),
                truncated=c.truncated or not survives,
            )
            for c, row, survives in zip(completions, rows, whole, strict=True)
        ]
        return made, whole.count(False)


def _shared(row: Chunked, logprobs: Sequence[float]) -> list[float]:
    """Return the log-probability of each chunk, spread evenly over its tokens of the student.

    >>> from kdrl_lightning.teachers.cross_tokenizer.aligner import Chunked
    >>> ids, zero = np.array([7, 8, 9]), np.array([0, 0])
    >>> _shared(Chunked(ids, np.array([0, 1, 0]), zero, np.array([0, 2]), None), [-3.0, -1.0])
    [-1.5, -1.5, -1.0]
    """
    # The roles are swapped: the row's `teacher_ids` and `teacher_places` are the student's.
    opens = np.maximum.accumulate(
        np.where(row.teacher_places == 0, np.arange(len(row.teacher_ids)), 0)
    )
    scored = row.places >= 0
    totals = np.bincount(
        row.columns[scored], np.array(logprobs, np.float64)[scored], len(row.teacher_ids)
    )
    out: list[float] = (totals[opens] / np.bincount(opens, minlength=len(opens))[opens]).tolist()
    return out
