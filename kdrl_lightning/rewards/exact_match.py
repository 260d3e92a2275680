"""Exact match with a reference answer."""

from __future__ import annotations

from kdrl_lightning.rewards.answers import after_marker
from kdrl_lightning.rewards.base import Sample, TaskReward


class ExactMatch(TaskReward):
    """1 if the completion's answer equals the row's, else 0; white space around both is ignored.

    Args:
        marker: the answer is what follows its last occurrence, in the completion (one without it
            has no answer) and, where it occurs there, in the reference; None takes all of both.
        answer_column: the row's column with the reference answer.

    >>> ExactMatch(marker="#")(Sample("6*7=42 #42", [], {"answer": "42"}))
    1.0
    """

    def __init__(self, marker: str | None = None, answer_column: str = "answer") -> None:
        self.marker = marker
        self.answer_column = answer_column

    def __call__(self, sample: Sample) -> float:
        """Judge one sample; a row without the answer's column is an error."""
        reference = str(sample.row[self.answer_column])
        if self.marker is not None:
            reference = reference.rpartition(self.marker)[2]
        return float(self.answer(sample) == reference.strip())

    def answer(self, sample: Sample) -> str | None:
        """Return what follows the marker; None without one."""
        if self.marker is None:
            return sample.text.strip()
        return after_marker(sample.text, self.marker)
