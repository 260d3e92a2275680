"""A reward with feedback on an addition: the first wrong column, or the right solution."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards.base import Sample, Verdict
from kdrl_lightning.tiny.addition import addition_reward, worked_answer

Shows: TypeAlias = Literal["column", "solution"]


class AdditionFeedback:
    """Judges an addition as ``addition_reward``, and says what is wrong with a wrong one.

    Args:
        shows: ``column``, the number of the first wrong column, from 1 on; the result counts as
            the last one. ``solution``, the right worked answer, which the embedded reader can read.

    Raises:
        ConfigurationError: ``shows`` is neither.

    >>> row = {"prompt": "1234+5678=", "answer": "06912"}
    >>> AdditionFeedback("column")(Sample("12,10,09,06#06902", [], row)).feedback
    '2'
    >>> AdditionFeedback("solution")(Sample("12,10,09,06#06902", [], row)).feedback
    '12,11,09,06#06912'
    """

    def __init__(self, shows: Shows = "solution") -> None:
        if shows not in get_args(Shows):
            raise ConfigurationError(
                f"`shows` must be one of {', '.join(get_args(Shows))}: got {shows}. "
                "column shows less."
            )
        self.shows = shows

    def __call__(self, sample: Sample) -> Verdict:
        """Judge one sample."""
        reward = addition_reward(sample)
        if reward >= 1.0:
            return Verdict(reward, True)
        right = solution(sample.row)
        said = right if self.shows == "solution" else str(first_wrong(sample.text, right))
        return Verdict(reward, False, feedback=said)


def solution(row: Row) -> str:
    """Return the right worked answer of a row of ``ColumnAddition``."""
    a, _, b = str(row["prompt"]).rstrip("=").partition("+")
    return worked_answer(int(a), int(b), len(a))


def first_wrong(text: str, right: str) -> int:
    """Return the number of the first column in which two worked answers differ, from 1 on.

    The result after the ``#`` counts as the last column.
    """
    columns, given = (t.replace("#", ",", 1).split(",") for t in (right, text))
    same = [a == b for a, b in zip(columns, given, strict=False)]
    return same.index(False) + 1 if False in same else min(len(same) + 1, len(columns))
