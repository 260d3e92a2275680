"""Rewards that combine others: a weighted sum, or a choice by a column of the row."""

from __future__ import annotations

from collections.abc import Sequence

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards.answers.extraction import answer_of
from kdrl_lightning.rewards.answers.references import accepted, missing
from kdrl_lightning.rewards.base import (
    BatchReward,
    Reward,
    Sample,
    TaskReward,
    Verdict,
    judge,
)


class WeightedRewards(BatchReward):
    """The weighted sum of several rewards; one of them decides correctness.

    Each reward is logged without its weight as ``reward/<name>_mean``, and its parts as
    ``reward/<name>.<part>_mean``. If one of them fails, the completion's reward fails.

    Args:
        rewards: rewards by name.
        correct: name of the reward that decides correctness; None: the first.
        weights: factor by name; a missing name has the factor 1.

    Raises:
        ConfigurationError: no rewards, an unknown name, or a weight that is not finite.

    >>> both = WeightedRewards({"short": lambda s: len(s.ids) < 3, "any": lambda s: 1.0},
    ...                        correct="short", weights={"any": 0.5})
    >>> both(Sample("", [1, 2], {}))
    Verdict(reward=1.5, correct=True, parts={'short': 1.0, 'any': 1.0}, feedback='')
    """

    def __init__(
        self,
        rewards: dict[str, Reward],
        correct: str | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        if not rewards:
            raise ConfigurationError("`rewards` must have at least one reward: got none. Add one.")
        names = ", ".join(rewards)
        if correct is not None and correct not in rewards:
            raise ConfigurationError(
                f"`correct` must be one of {names}: got {correct}. Name one of `rewards`."
            )
        for name, weight in (weights or {}).items():
            if name not in rewards:
                raise ConfigurationError(
                    f"`weights` must name only {names}: got {name}. Name one of `rewards`."
                )
            if not abs(weight) < float("inf"):
                raise ConfigurationError(
                    f"`weights` must be finite: got {weight} for {name}. Correct it."
                )
        self.rewards = rewards
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in rewards}
        self.correct = correct or next(iter(rewards))

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge all samples with one reward after the other, and sum the results."""
        results = {name: judge(reward, samples) for name, reward in self.rewards.items()}
        return [self._sum({n: r[i] for n, r in results.items()}) for i in range(len(samples))]

    def children(self) -> Sequence[Reward]:
        """Return the rewards of the sum."""
        return list(self.rewards.values())

    def answer(self, sample: Sample) -> str | None:
        """Return the answer that the reward named by ``correct`` extracts."""
        return answer_of(self.rewards[self.correct], sample)

    def _sum(self, results: dict[str, Verdict | Exception]) -> Verdict | Exception:
        total, correct, parts, feedback = 0.0, False, {}, []
        for name, result in results.items():
            if isinstance(result, Exception):
                return result
            total += self.weights[name] * result.reward
            parts[name] = result.reward
            parts |= {f"{name}.{part}": value for part, value in result.parts.items()}
            correct = result.correct if name == self.correct else correct
            feedback.append(result.feedback)
        return Verdict(total, correct, parts, "\n".join(filter(None, feedback)))


class RoutedReward(BatchReward):
    """Judges each row with the reward that a column names, e.g. for a mixture of ``MixedPrompts``.

    Args:
        rewards: rewards by value of the column.
        column: the row's column that selects the reward.

    Raises:
        ConfigurationError: no rewards.
    """

    def __init__(self, rewards: dict[str, Reward], column: str = "source") -> None:
        if not rewards:
            raise ConfigurationError("`rewards` must have at least one reward: got none. Add one.")
        self.rewards = {str(name): reward for name, reward in rewards.items()}
        self.column = column

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge the samples; each reward gets all of its samples in one call."""
        results: list[float | Verdict | Exception] = [
            KeyError(f"no reward for {self.column} {sample.row.get(self.column)!r}")
            for sample in samples
        ]
        for name, reward in self.rewards.items():
            routed = [i for i, s in enumerate(samples) if self._name(s.row) == name]
            judged = judge(reward, [samples[i] for i in routed])
            for i, result in zip(routed, judged, strict=True):
                results[i] = result
        return results

    def children(self) -> Sequence[Reward]:
        """Return the rewards of all values of the column."""
        return list(self.rewards.values())

    def check(self, row: Row) -> None:
        """Check a row with its reward; a row without a reward fails when it is judged."""
        reward = self._of(row)
        if isinstance(reward, TaskReward):
            reward.check(row)

    def list_as_text(self, row: Row) -> str | None:
        """Return the answer if the row's reward reports a list or a dict as text; else None."""
        reward = self._of(row)
        return reward.list_as_text(row) if isinstance(reward, TaskReward) else None

    def answer(self, sample: Sample) -> str | None:
        """Return the answer that the row's reward extracts."""
        name = self._name(sample.row) or str(sample.row[self.column])
        return answer_of(self.rewards[name], sample)

    def _of(self, row: Row) -> Reward | None:
        return self.rewards.get(self._name(row) or "")

    def _name(self, row: Row) -> str | None:
        """Return the key of ``rewards`` that matches the column's value; None if no key does.

        2.0 also matches ``2``, and ``True`` also matches ``true``; see ``accepted``.
        """
        value = row.get(self.column)
        names = () if missing(value) else accepted(row, self.column)
        return next((name for name in (str(value), *names) if name in self.rewards), None)
