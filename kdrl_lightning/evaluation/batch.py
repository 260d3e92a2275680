"""The batch that an evaluation step gets: prompts with judged completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.evaluation.sets import NamedSet
from kdrl_lightning.rewards.answers.extraction import answer_of
from kdrl_lightning.rewards.base import Reward, Sample
from kdrl_lightning.rollout.generation import Judged

ROW = "row"  # holds the prompt's columns whose names are already taken


@dataclass(frozen=True)
class EvaluationBatch:
    """P prompts with n completions each; P is 0 on a rank that has no prompts left.

    Attributes:
        of: the evaluation set of the prompts.
        rows: the P row numbers in the set.
        judged: ``P * n`` completions, those of a prompt next to each other.
        answers: ``P * n`` extracted answers; None if a completion has none.
    """

    of: NamedSet
    rows: Sequence[int]
    judged: Sequence[Judged]
    answers: Sequence[str | None]

    @classmethod
    def from_judged(
        cls, of: NamedSet, rows: Sequence[int], judged: Sequence[Judged], reward: Reward
    ) -> EvaluationBatch:
        """Return a batch whose answers the reward extracts."""
        samples = (Sample(j.text, j.completion.ids, j.row, j.completion.truncated) for j in judged)
        return cls(of, rows, judged, [answer_of(reward, sample) for sample in samples])

    @property
    def correct(self) -> Tensor:
        """``[P, n]`` bool: the verifier accepts the completion."""
        return self._table([j.verdict.correct for j in self.judged]).bool()

    @property
    def rewards(self) -> Tensor:
        """``[P, n]`` float64: rewards."""
        return self._table([j.verdict.reward for j in self.judged])

    @property
    def lengths(self) -> Tensor:
        """``[P, n]`` float64: number of sampled tokens."""
        return self._table([len(j.completion.ids) for j in self.judged])

    @property
    def truncated(self) -> Tensor:
        """``[P, n]`` bool: the completion was cut at the token limit."""
        return self._table([j.completion.truncated for j in self.judged]).bool()

    @property
    def answer_ids(self) -> Tensor:
        """``[P, n]`` int64: each prompt's distinct answers, numbered from 0; -1 is no answer."""
        n, ids = self.of.samples, []
        for start in range(0, len(self.answers), n):
            numbers: dict[str, int] = {}
            for answer in self.answers[start : start + n]:
                ids.append(-1 if answer is None else numbers.setdefault(answer, len(numbers)))
        return self._table(ids).long()

    def predictions(self) -> list[dict[str, object]]:
        """Return one row per completion: the prompt's columns, the completion and its verdict.

        A column of the prompt whose name is already taken (or ``row``) is stored in the mapping
        ``row``. Without such a column there is no ``row``.
        """
        n = self.of.samples
        named = {"set": self.of.name} if self.of.name else {}
        return [
            _beside(
                judged.row,
                {
                    **named,
                    "index": self.rows[i // n],
                    "sample": i % n,
                    "completion": judged.text,
                    "answer_found": answer,
                    "reward": judged.verdict.reward,
                    "parts": dict(judged.verdict.parts),
                    "correct": judged.verdict.correct,
                    "truncated": judged.completion.truncated,
                    "length": len(judged.completion.ids),
                },
            )
            for i, (judged, answer) in enumerate(zip(self.judged, self.answers, strict=True))
        ]

    def _table(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).view(-1, self.of.samples)


def _beside(row: Row, ours: dict[str, object]) -> dict[str, object]:
    theirs = {name: value for name, value in row.items() if name not in (*ours, "set", ROW)}
    hidden = {name: value for name, value in row.items() if name not in theirs}
    return {**theirs, **ours, **({ROW: hidden} if hidden else {})}
