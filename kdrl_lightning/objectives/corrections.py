"""Corrections for a sampling engine that disagrees with the trainer."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.losses import importance_mask, importance_weights
from kdrl_lightning.objectives.base import Part, known
from kdrl_lightning.rollout_batch import RolloutBatch


class EngineCorrection(Part):
    """Weights of the student's sampled tokens, from the engine's and the trainer's log-probs."""

    @abstractmethod
    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """``[B, T]`` weights, once per rollout."""


class TruncatedImportance(EngineCorrection):
    """Importance weights ``min(pi_old / mu, cap)`` of each token.

    Args:
        cap: largest weight, at least 1.
    """

    def __init__(self, cap: float = 2.0) -> None:
        require_between("cap", cap, 1.0, float("inf"), "2 is usual.")
        self.cap = cap

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Weight by the truncated ratio."""
        return importance_weights(*_pair(rollout), self.cap)


class MaskedImportance(EngineCorrection):
    """Leave out tokens whose ratio ``pi_old / mu`` lies outside ``[low, high]``.

    Args:
        low: smallest ratio kept, above 0 and at most 1.
        high: largest ratio kept, at least 1.
    """

    def __init__(self, low: float = 0.5, high: float = 2.0) -> None:
        if not 0.0 < low <= 1.0:
            raise ConfigurationError(f"`low` must be above 0 and at most 1: got {low}.")
        require_between("high", high, 1.0, float("inf"))
        self.low = low
        self.high = high

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Weight by 1 or 0."""
        old, rollout_logprobs = _pair(rollout)
        return importance_mask(old, rollout_logprobs, self.low, self.high).to(old.dtype)


def _pair(rollout: RolloutBatch) -> tuple[Tensor, Tensor]:
    old = known(rollout.old_logprobs, "old_logprobs")
    return old, known(rollout.rollout_logprobs, "rollout_logprobs")
