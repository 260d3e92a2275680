"""Logic-RL's reward for Knights and Knaves: the sum of a format reward and an answer reward."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards.answers.extraction import in_think_format, last_tagged
from kdrl_lightning.rewards.answers.references import accepted
from kdrl_lightning.rewards.base import Sample, TaskReward, Verdict

CLAIM = re.compile(r"\b(\w+)\s+is\s+(?:an?\s+)?(\w+)", re.IGNORECASE)


class KnightsAndKnavesReward(TaskReward):
    """Sum of a format reward and an answer reward (Logic-RL, arXiv 2502.14768).

    The format is that of ``FormatReward``. The answer is read from the answer tags, only if the
    format is right, and must name the role of each inhabitant exactly once. The verdict's ``parts``
    are ``format`` and ``answer``; a completion is correct if both are right.

    Args:
        answer_column: the row's column with the solution (``Emma is a knight, and Liam is ...``),
            or with a list of accepted solutions.
        format: reward for the right format; a wrong format gets minus this value.
        right: reward for the right answer.
        wrong: reward for an answer with a wrong role.
        unreadable: reward if there is no answer, or if it omits an inhabitant or names one twice.
        opened: the prompt already ends with ``<think>``.
    """

    def __init__(
        self,
        answer_column: str = "answer",
        format: float = 1.0,
        right: float = 2.0,
        wrong: float = -1.5,
        unreadable: float = -2.0,
        opened: bool = False,
    ) -> None:
        self.answer_column = answer_column
        self.format = format
        self.right = right
        self.wrong = wrong
        self.unreadable = unreadable
        self.opened = opened

    def __call__(self, sample: Sample) -> Verdict:
        """Judge one sample.

        Raises:
            KeyError: the row has no ``answer_column``.
            ConfigurationError: the row's solution cannot be read.
        """
        solutions = self._solutions(sample.row)
        formed = in_think_format(sample.text, self.opened)
        given = self._given(sample, solutions[0])
        correct = given in solutions
        value = self.unreadable if given is None else self.right if correct else self.wrong
        parts = {"format": self.format if formed else -self.format, "answer": value}
        return Verdict(sum(parts.values()), correct, parts)

    def answer(self, sample: Sample) -> str | None:
        """Return each inhabitant's claimed role, sorted by name; None if it cannot be read."""
        given = self._given(sample, self._solutions(sample.row)[0])
        return None if given is None else ", ".join(f"{n} {given[n]}" for n in sorted(given))

    def check(self, row: Row) -> None:
        """Check that the row's solution can be read."""
        self._solutions(row)

    def _solutions(self, row: Row) -> Sequence[dict[str, str]]:
        rule = f"`{self.answer_column}` must name the role of each inhabitant once"
        try:
            read = [claims(text) for text in accepted(row, self.answer_column)]
        except ConfigurationError as error:
            raise ConfigurationError(f"{rule}: {error}") from error
        solutions = [dict(solution) for solution in read]
        names = {frozenset(solution) for solution in solutions}
        doubled = any(len(one) != len(all_) for one, all_ in zip(solutions, read, strict=True))
        if doubled or len(names) != 1 or not solutions[0]:
            raise ConfigurationError(
                f"{rule}: got {row[self.answer_column]!r:.100}. Write it as `Emma is a knight, and "
                "Liam is a knave.`"
            )
        return solutions

    def _given(self, sample: Sample, solution: dict[str, str]) -> dict[str, str] | None:
        formed = in_think_format(sample.text, self.opened)
        answer = last_tagged(sample.text, "answer") if formed else None
        given = [claim for claim in claims(answer or "") if claim[0] in solution]
        readable = len(given) == len(solution) == len(dict(given))
        return dict(given) if readable else None


def claims(text: str) -> list[tuple[str, str]]:
    """Return the (name, role) pairs that a text claims, in lower case.

    >>> claims("Emma is a knight, and Liam is an egoist.")
    [('emma', 'knight'), ('liam', 'egoist')]
    """
    return [(name.lower(), role.lower()) for name, role in CLAIM.findall(text)]
