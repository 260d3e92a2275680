"""The reward protocol, and the runner that keeps a bad reward from corrupting a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_between


@dataclass(frozen=True)
class Sample:
    """What a reward sees.

    Attributes:
        text: the decoded completion, without special tokens.
        ids: its tokens as the engine sampled them.
        row: the prompt's row, with whatever columns the source has.
        truncated: the completion was cut at the token limit.
    """

    text: str
    ids: Sequence[int]
    row: Mapping[str, Any]
    truncated: bool = False


@dataclass(frozen=True)
class Verdict:
    """A reward that differs from the verifier's answer (partial credit, penalties).

    Attributes:
        reward: what the policy is trained on.
        correct: the verifier's answer.
        parts: what the reward is made of, by name.
    """

    reward: float
    correct: bool
    parts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, result: float | Verdict) -> Verdict:
        """Return a reward's result as a verdict; a number is correct from 1 on."""
        return result if isinstance(result, Verdict) else cls(float(result), result >= 1)


Reward: TypeAlias = Callable[[Sample], float | Verdict]


class RewardRunner:
    """Calls a reward; a failing one is counted, and its completion gets 0 and counts as wrong.

    Args:
        reward: any callable of one sample. A plain number is its own verdict: correct from 1 on.
        max_failure_frac: stop when more than this fraction of a rollout (and more than one
            completion) fails, in [0, 1].
    """

    def __init__(self, reward: Reward, max_failure_frac: float = 0.1) -> None:
        require_between("max_reward_failure_frac", max_failure_frac, 0.0, 1.0)
        self.reward = reward
        self.max_failure_frac = max_failure_frac
        self.failures = 0

    def try_once(self, row: Mapping[str, Any]) -> None:
        """Try the reward on a real row, before anything is trained.

        Once with an empty completion, which students do produce, and once with a text.

        Raises:
            ConfigurationError: it raises, or returns something that is not a finite number.
        """
        for text in ("", str(row.get("prompt", "text"))):
            try:
                self._verdict(Sample(text, [0] * len(text), row))
            except Exception as error:
                raise ConfigurationError(
                    f"`reward` must return a finite number: got {_describe(error)} for the "
                    f"completion {text[:40]!r} of the row {_shorten(row)}. "
                    "Mend the reward function."
                ) from error

    def __call__(self, samples: Sequence[Sample], training: bool = True) -> list[Verdict]:
        """Judge samples.

        Args:
            samples: of one rollout, or of one evaluation batch.
            training: stop on too many failures; an evaluation only warns of them.

        Raises:
            TrainingStopped: too many of a rollout's samples fail.
        """
        verdicts, failures, last = [], 0, ""
        for sample in samples:
            try:
                verdicts.append(self._verdict(sample))
            except Exception as error:
                failures, last = failures + 1, _describe(error)
                verdicts.append(Verdict(0.0, False))
        self.failures += failures
        if failures and not training:
            warnings.warn(
                f"the reward failed on {failures} of {len(samples)} completions of an evaluation, "
                f"which count as wrong: last {last}.",
                stacklevel=2,
            )
        elif failures > max(1, math.floor(self.max_failure_frac * len(samples) + 1e-9)):
            raise TrainingStopped(
                f"the reward failed on {failures} of {len(samples)} completions, above "
                f"{self.max_failure_frac:.0%}: last {last}. Mend the reward function."
            )
        return verdicts

    def _verdict(self, sample: Sample) -> Verdict:
        verdict = Verdict.of(self.reward(sample))
        if not math.isfinite(verdict.reward):
            raise ValueError(f"reward {verdict.reward}")
        return Verdict(float(verdict.reward), bool(verdict.correct), verdict.parts)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _shorten(row: Mapping[str, Any], limit: int = 120) -> str:
    text = repr(dict(row))
    return text if len(text) <= limit else text[:limit] + "..."
