"""Runs a reward so that whatever it does, the training run stays sound."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_between
from kdrl_lightning.rewards.answers.references import shorten
from kdrl_lightning.rewards.base import Reward, Sample, TaskReward, Verdict, judge, walk
from kdrl_lightning.rewards.callables import require_callable


@dataclass(frozen=True)
class RewardFailures:
    """What follows when the reward fails on a completion.

    Args:
        max_frac: stop when the reward fails on more than this part of a rollout, and on more than
            one completion, in [0, 1].
        reward: what a completion gets on which the reward fails; it counts as wrong.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    max_frac: float = 0.1
    reward: float = 0.0

    def __post_init__(self) -> None:
        require_between("reward_failures.max_frac", self.max_frac, 0.0, 1.0)
        require_between("reward_failures.reward", self.reward, -1e9, 1e9)


class RewardRunner:
    """Calls a reward; a failing one is counted, and its completion counts as wrong.

    Args:
        reward: any callable of one sample, or a ``TaskReward``. A plain number is its own verdict:
            correct from 1 on.
        failures: what follows from a reward that fails.

    Attributes:
        failures: of all samples so far, those of evaluations among them.
    """

    def __init__(self, reward: Reward, failures: RewardFailures = RewardFailures()) -> None:
        for part in walk(reward):
            require_callable("reward", part)
        self.reward = reward
        self.max_failure_frac = failures.max_frac
        self.failed = Verdict(float(failures.reward), False)
        self.failures = self._untold = 0
        self._shown: set[type[Exception]] = set()

    def try_once(self, row: Mapping[str, Any]) -> None:
        """Try the reward on a real row, before anything is trained.

        Once with an empty completion, which students do produce, and once with a text.

        Raises:
            ConfigurationError: it raises, or returns something that is not a finite number.
        """
        texts = ("", str(row.get("prompt", "text")))
        samples = [Sample(text, [0] * len(text), row) for text in texts]
        for text, result in zip(texts, judge(self.reward, samples), strict=True):
            if isinstance(result, ConfigurationError):  # says by itself what to mend
                raise result
            if isinstance(result, Exception):
                raise ConfigurationError(
                    f"`reward` must return a finite number: got {_describe(result)} for the "
                    f"completion {text[:40]!r} of the row {shorten(row)}. "
                    "Mend the reward function."
                ) from result
        self.check([row])

    def check(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Let the reward look at rows before training, without completions.

        Raises:
            ConfigurationError: it cannot judge a row, which the message shows.
        """
        if not isinstance(self.reward, TaskReward):
            return
        for row in rows:
            try:
                self.reward.check(row)
            except ConfigurationError:  # says by itself what to mend
                raise
            except Exception as error:
                raise ConfigurationError(
                    f"`reward` must be able to judge every row: got {_describe(error)} for the row "
                    f"{shorten(row)}. Mend the row, or leave it out."
                ) from error

    def __call__(self, samples: Sequence[Sample], training: bool = True) -> list[Verdict]:
        """Judge samples.

        Args:
            samples: of one rollout, or of one evaluation batch.
            training: stop on too many failures; an evaluation only warns of them.

        Raises:
            TrainingStopped: too many of a rollout's samples fail.
        """
        results = judge(self.reward, samples)
        errors = [result for result in results if isinstance(result, Exception)]
        self.failures += len(errors)
        self._untold += len(errors) if training else 0
        if errors:
            self._report(errors, len(samples), training)
        return [self.failed if isinstance(result, Exception) else result for result in results]

    def take_failures(self) -> int:
        """Return those of training since the last call."""
        untold, self._untold = self._untold, 0
        return untold

    def start(self) -> None:
        """Check that the reward can work here.

        Raises:
            ConfigurationError: something is missing.
        """
        if isinstance(self.reward, TaskReward):
            self.reward.start()

    def close(self) -> None:
        """End the reward's processes."""
        if isinstance(self.reward, TaskReward):
            self.reward.close()

    def _report(self, errors: list[Exception], count: int, training: bool) -> None:
        last = _describe(errors[-1])
        if training and len(errors) > max(1, math.floor(self.max_failure_frac * count + 1e-9)):
            raise TrainingStopped(
                f"the reward failed on {len(errors)} of {count} completions, above "
                f"{self.max_failure_frac:.0%}: last {last}. Mend the reward function."
            )
        kinds = {type(error) for error in errors}
        if not training or kinds - self._shown:
            where = "an evaluation" if not training else "a rollout"
            which = "" if not training else f" and get {self.failed.reward:g}"
            warnings.warn(
                f"the reward failed on {len(errors)} of {count} completions of {where}, "
                f"which count as wrong{which}: last {last}.",
                stacklevel=3,
            )
        self._shown |= kinds if training else set()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
