"""Corrections for a sampling engine whose log-probabilities differ from the trainer's."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.losses import importance_mask, importance_weights, sequence_sum
from kdrl_lightning.objectives.base import Part, known
from kdrl_lightning.rollout_batch import RolloutBatch

Level = Literal["token", "sequence"]


class EngineCorrection(Part):
    """Weights the student's tokens by ``pi_old / mu``: trainer probability / engine probability."""

    reads_old_scores = True

    @abstractmethod
    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B, T]`` weights, once per rollout."""


class NoCorrection(EngineCorrection):
    """Leaves samples uncorrected, even if the engine's log-probabilities are not the trainer's."""

    reads_old_scores = False

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return weights of 1."""
        return torch.ones_like(known(rollout.rollout_logprobs, "rollout_logprobs"))


class TruncatedImportance(EngineCorrection):
    """Weights tokens by ``min(pi_old / mu, cap)``: truncated importance sampling.

    mu is the probability that the engine reported, pi_old that of the trainer.

    Args:
        cap: largest weight, at least 1.
        level: use the ratio of each ``token``, or the product over the whole completion
            (``sequence``), which is unbiased up to the cap but has a larger variance.
    """

    def __init__(self, cap: float = 2.0, level: Level = "token") -> None:
        require_between("cap", cap, 1.0, float("inf"), "2 is usual.")
        self.cap = cap
        self.level = _checked(level)

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return the truncated ratios."""
        log_ratio = _log_ratio(rollout, self.level)
        return importance_weights(log_ratio, torch.zeros_like(log_ratio), self.cap)


class MaskedImportance(EngineCorrection):
    """Leaves out tokens or completions with a ratio ``pi_old / mu`` outside ``[low, high]``.

    Args:
        low: smallest ratio kept, above 0 and at most 1.
        high: largest ratio kept, at least 1.
        level: judge each ``token`` by its ratio, or a whole completion by the product of its ratios
            (``sequence``).
    """

    def __init__(self, low: float = 0.5, high: float = 2.0, level: Level = "token") -> None:
        if not 0.0 < low <= 1.0:
            raise ConfigurationError(
                f"`low` must be above 0 and at most 1: got {low}. 0.5 is usual."
            )
        require_between("high", high, 1.0, float("inf"))
        self.low = low
        self.high = high
        self.level = _checked(level)

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return weights of 1 or 0."""
        log_ratio = _log_ratio(rollout, self.level)
        kept = importance_mask(log_ratio, torch.zeros_like(log_ratio), self.low, self.high)
        return kept.to(log_ratio.dtype)


def _checked(level: Level) -> Level:
    if level not in get_args(Level):
        raise ConfigurationError(
            f"`level` must be token or sequence: got {level}. Choose one of them."
        )
    return level


def _log_ratio(rollout: RolloutBatch, level: Level) -> Tensor:
    old = known(rollout.old_logprobs, "old_logprobs")
    log_ratio = old - known(rollout.rollout_logprobs, "rollout_logprobs")
    return sequence_sum(log_ratio, rollout.completion_mask) if level == "sequence" else log_ratio
