"""A reward for an exact match with the reference answer."""

from __future__ import annotations

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards.answers.extraction import after_marker
from kdrl_lightning.rewards.answers.references import accepted, list_as_text, shorten
from kdrl_lightning.rewards.base import Sample, TaskReward


class ExactMatch(TaskReward):
    """Give 1 if the completion's answer equals a reference answer of the row, else 0.

    White space around both is ignored. See ``accepted`` for numbers, lists and missing answers.

    Args:
        marker: the answer is the text after its last occurrence. A completion without the marker
            has no answer; a reference without it counts whole. None: compare the whole texts.
        answer_column: the row's column with the reference answer.

    >>> ExactMatch(marker="#")(Sample("6*7=42 #42", [], {"answer": "42"}))
    1.0
    """

    def __init__(self, marker: str | None = None, answer_column: str = "answer") -> None:
        self.marker = marker
        self.answer_column = answer_column

    def __call__(self, sample: Sample) -> float:
        """Judge one sample.

        Raises:
            KeyError: the row has no ``answer_column``.
            ConfigurationError: the row has no answer.
        """
        return float(self.answer(sample) in self._references(sample.row))

    def check(self, row: Row) -> None:
        """Check that the row has an answer."""
        self._references(row)

    def list_as_text(self, row: Row) -> str | None:
        """Return the answer if it is the text of a list or a dict."""
        return list_as_text(row, self.answer_column)

    def answer(self, sample: Sample) -> str | None:
        """Return the text after the last marker; None if the completion has no marker."""
        if self.marker is None:
            return sample.text.strip()
        return after_marker(sample.text, self.marker)

    def _references(self, row: Row) -> list[str]:
        texts = accepted(row, self.answer_column)
        if self.marker is None:
            return list(texts)
        cut = [text.rpartition(self.marker)[2].strip() for text in texts]
        if not any(cut):
            raise ConfigurationError(
                f"`{self.answer_column}` must have an answer after {self.marker!r}: got "
                f"{texts[0]!r:.40} in the row {shorten(row)}. Add the answer, or remove the row."
            )
        return [text for text in cut if text]
