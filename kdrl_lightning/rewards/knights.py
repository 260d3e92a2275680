"""Knights and Knaves: format and answer, as Logic-RL rewards them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards.answers.extraction import in_think_format, last_tagged
from kdrl_lightning.rewards.answers.references import accepted
from kdrl_lightning.rewards.base import Sample, TaskReward, Verdict

CLAIM = re.compile(r"\b(\w+)\s+is\s+(?:an?\s+)?(\w+)", re.IGNORECASE)


class KnightsAndKnavesReward(TaskReward):
    """Format and answer, separately (Logic-RL, arXiv 2502.14768).

    The format is that of ``FormatReward``. The answer counts only where the format is right; it is
    read from the answer's tags, and must say of each inhabitant once what he is. ``parts`` has
    ``format`` and ``answer``; correct is a right answer in the right format.

    Args:
        answer_column: the row's column with the solution: ``Emma is a knight, and Liam is ...``,
            or with several of which each is right.
        format: for the right format; less that for a wrong one.
        right: for the right answer.
        wrong: for one with a wrong role.
        unreadable: for none, or one that leaves an inhabitant out or names him twice.
        opened: the prompt ends with ``<think>``.
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
        """Judge one sample; a row whose solution cannot be read is an error."""
        solutions = self._solutions(sample.row)
        formed = in_think_format(sample.text, self.opened)
        given = self._given(sample, solutions[0])
        correct = given in solutions
        value = self.unreadable if given is None else self.right if correct else self.wrong
        parts = {"format": self.format if formed else -self.format, "answer": value}
        return Verdict(sum(parts.values()), correct, parts)

    def answer(self, sample: Sample) -> str | None:
        """Return who is said to be what, in the order of the names; None if it cannot be read."""
        given = self._given(sample, self._solutions(sample.row)[0])
        return None if given is None else ", ".join(f"{n} {given[n]}" for n in sorted(given))

    def check(self, row: Mapping[str, Any]) -> None:
        """Make sure that the row's solution can be read."""
        self._solutions(row)

    def _solutions(self, row: Mapping[str, Any]) -> Sequence[dict[str, str]]:
        rule = f"`{self.answer_column}` must say once what each inhabitant is"
        try:
            read = [claims(text) for text in accepted(row, self.answer_column)]
        except ConfigurationError as error:
            raise ConfigurationError(f"{rule}: {error}") from error
        solutions = [dict(solution) for solution in read]
        names = {frozenset(solution) for solution in solutions}
        doubled = any(len(one) != len(all_) for one, all_ in zip(solutions, read, strict=True))
        if doubled or len(names) != 1 or not solutions[0]:
            raise ConfigurationError(f"{rule}: got {row[self.answer_column]!r:.100}.")
        return solutions

    def _given(self, sample: Sample, solution: dict[str, str]) -> dict[str, str] | None:
        formed = in_think_format(sample.text, self.opened)
        answer = last_tagged(sample.text, "answer") if formed else None
        given = [claim for claim in claims(answer or "") if claim[0] in solution]
        readable = len(given) == len(solution) == len(dict(given))
        return dict(given) if readable else None


def claims(text: str) -> list[tuple[str, str]]:
    """Return who is said to be what, in small letters.

    >>> claims("Emma is a knight, and Liam is an egoist.")
    [('emma', 'knight'), ('liam', 'egoist')]
    """
    return [(name.lower(), role.lower()) for name, role in CLAIM.findall(text)]
