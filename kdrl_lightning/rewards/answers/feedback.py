"""A reward that also says in words what is wrong with a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards.answers.extraction import answer_of
from kdrl_lightning.rewards.answers.references import accepted
from kdrl_lightning.rewards.base import BatchReward, Reward, Sample, TaskReward, Verdict, judge

Shows: TypeAlias = Literal["form", "verdict", "reference"]
LONGEST = 200  # characters of an answer in the feedback


class AnswerFeedback(BatchReward):
    """Adds one line on a wrong completion to a reward that compares answers.

    The line is the verdict's ``feedback``, which a ``FeedbackContext`` shows to a teacher. If the
    reward returns feedback itself, that is kept. A correct completion gets none. ``shows`` decides
    how much the line tells:

    - ``form``: that the answer is missing, or that the completion was truncated before it; nothing
      about a wrong answer.
    - ``verdict``: also that the answer is wrong, with the answer that the reward has extracted.
    - ``reference``: also the right answer.

    Args:
        reward: judges the completion, such as ``ExactMatch``, ``MathReward``,
            ``ReasoningGymReward`` or a function.
        shows: how much the line tells.
        answer_column: the row's column with the right answer; only ``reference`` reads it.

    Raises:
        ConfigurationError: ``shows`` is unknown.

    >>> from kdrl_lightning.rewards import ExactMatch
    >>> reward = AnswerFeedback(ExactMatch(marker="#"), shows="reference")
    >>> reward(Sample("6*7 #41", [], {"answer": "42"})).feedback
    'The answer 41 is wrong. The right answer is 42.'
    >>> reward(Sample("6*7", [], {"answer": "42"}, truncated=True)).feedback
    'The answer is missing: the text was cut off. The right answer is 42.'
    """

    def __init__(
        self, reward: Reward, shows: Shows = "verdict", answer_column: str = "answer"
    ) -> None:
        if shows not in get_args(Shows):
            raise ConfigurationError(
                f"`shows` must be one of {', '.join(get_args(Shows))}: got {shows}. "
                "verdict does not show the right answer."
            )
        self.reward = reward
        self.shows = shows
        self.answer_column = answer_column

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge the samples with the reward, and add feedback to wrong ones."""
        results = judge(self.reward, samples)
        return [self._with(one, s) for one, s in zip(results, samples, strict=True)]

    def children(self) -> Sequence[Reward]:
        """Return the wrapped reward."""
        return [self.reward]

    def answer(self, sample: Sample) -> str | None:
        """Return the answer that the reward extracts."""
        return answer_of(self.reward, sample)

    def check(self, row: Row) -> None:
        """Check the row with the reward, and that it has an answer if the line shows it.

        Raises:
            ConfigurationError: the row has no answer.
        """
        if isinstance(self.reward, TaskReward):
            self.reward.check(row)
        if self.shows != "reference":
            return
        if self.answer_column not in row:
            raise ConfigurationError(
                f"`answer_column` must be a column of each row: got {self.answer_column}, and a "
                f"row with {', '.join(map(str, row))}. Name another column, or show less."
            )
        accepted(row, self.answer_column)

    def _with(self, result: Verdict | Exception, sample: Sample) -> Verdict | Exception:
        if isinstance(result, Exception) or result.correct or result.feedback:
            return result
        given = one_line(self.answer(sample) or "")
        missing = "the text was cut off" if sample.truncated else "no answer was found"
        lines = [] if given else [f"The answer is missing: {missing}."]
        if given and self.shows != "form":
            lines.append(f"The answer {given} is wrong.")
        if self.shows == "reference":
            right = accepted(sample.row, self.answer_column)[0]
            lines.append(f"The right answer is {one_line(right)}.")
        return replace(result, feedback=" ".join(lines))


def one_line(text: str) -> str:
    r"""Return a text in one line, truncated after ``LONGEST`` characters.

    >>> one_line("x = 1\n  or 2")
    'x = 1 or 2'
    """
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[:LONGEST] + "..."
