"""Exact match with a reference answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards.answers.extraction import after_marker
from kdrl_lightning.rewards.answers.references import accepted, shorten
from kdrl_lightning.rewards.base import Sample, TaskReward


class ExactMatch(TaskReward):
    """1 if the completion's answer equals one that the row accepts, else 0.

    White space around both is ignored. See ``accepted`` for numbers, lists and missing answers.

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
        return float(self.answer(sample) in self._references(sample.row))

    def check(self, row: Mapping[str, Any]) -> None:
        """Make sure that the row has an answer."""
        self._references(row)

    def answer(self, sample: Sample) -> str | None:
        """Return what follows the marker; None without one."""
        if self.marker is None:
            return sample.text.strip()
        return after_marker(sample.text, self.marker)

    def _references(self, row: Mapping[str, Any]) -> list[str]:
        texts = accepted(row, self.answer_column)
        if self.marker is None:
            return list(texts)
        cut = [text.rpartition(self.marker)[2].strip() for text in texts]
        if not any(cut):
            raise ConfigurationError(
                f"`{self.answer_column}` must have an answer after {self.marker!r}: got "
                f"{texts[0]!r:.40} in the row {shorten(row)}. Fill it in, or leave the row out."
            )
        return [text for text in cut if text]
