"""Ratio rules: which ratio multiplies the advantage, and how it is clipped."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.losses import (
    cispo_surrogate,
    clipped_surrogate,
    luffy_surrogate,
    sequence_log_ratio,
    sequence_surrogate,
    trrd_log_ratio,
    trrd_surrogate,
)
from kdrl_lightning.objectives.base import Part, check_coefficient, known
from kdrl_lightning.rollout_batch import RolloutBatch


class Ratio(Part):
    """A surrogate ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``, per token.

    Args:
        clip_low: the ratio is clipped below at ``1 - clip_low``, in [0, 1].
        clip_high: the ratio is clipped above at ``1 + clip_high``, at least 0.
        dual_clip: upper bound on the ratio where A < 0, above 1 (arXiv 1912.09729); None for none.
    """

    def __init__(
        self, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None
    ) -> None:
        require_between("clip_low", clip_low, 0.0, 1.0)
        require_between("clip_high", clip_high, 0.0, float("inf"))
        if dual_clip is not None and not 1.0 < dual_clip < float("inf"):
            raise ConfigurationError(
                f"`dual_clip` must be above 1: got {dual_clip}. 3 is usual, null switches it off."
            )
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip

    @property
    def anchored(self) -> bool:
        """Whether the teacher stands in the ratio."""
        return False

    @property
    def to_behavior(self) -> bool:
        """Whether it divides by what the engine reported: nothing is left to correct."""
        return False

    @abstractmethod
    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """``[B, T]`` surrogate for advantages ``[B, T]``."""

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """``[B, T]`` log of the ratio."""
        return logprobs - known(batch.old_logprobs, "old_logprobs")

    def outside(self, batch: RolloutBatch, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T]`` bool each: the ratio lies below, above the clip range."""
        log_ratio = self.log_ratio(batch, logprobs)
        low = math.log1p(-self.clip_low) if self.clip_low < 1.0 else -math.inf
        return log_ratio < low, log_ratio > math.log1p(self.clip_high)

    def dead(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """``[B, T]`` bool: the clip removes the gradient."""
        below, above = self.outside(batch, logprobs)
        far = torch.zeros_like(above)
        if self.dual_clip is not None:
            far = self.log_ratio(batch, logprobs) > math.log(self.dual_clip)
        return torch.where(advantages < 0, below | far, above & (advantages > 0))


class TokenRatio(Ratio):
    """PPO's ratio of each token, ``rho = pi / pi_old``: GRPO (arXiv 2402.03300).

    DAPO (2503.14476) takes ``clip_high`` 0.28.
    """

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Clip rho."""
        old = known(batch.old_logprobs, "old_logprobs")
        return clipped_surrogate(
            logprobs, old, advantages, self.clip_low, self.clip_high, self.dual_clip
        )


class SequenceRatio(Ratio):
    """One ratio for a whole completion, ``(pi / pi_old)^(1/|o|)``: GSPO (arXiv 2507.18071).

    Args:
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
    """

    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4) -> None:
        super().__init__(clip_low, clip_high)

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Clip the sequence ratio."""
        old = known(batch.old_logprobs, "old_logprobs")
        return sequence_surrogate(
            logprobs, old, advantages, batch.loss_mask, self.clip_low, self.clip_high
        )

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the row's ratio at each of its tokens."""
        old = known(batch.old_logprobs, "old_logprobs")
        return sequence_log_ratio(logprobs, old, batch.loss_mask)


class WeightRatio(Ratio):
    """rho as a clipped, detached weight of ``A log pi``: CISPO (arXiv 2506.13585).

    Args:
        clip_high: the weight is at most ``1 + clip_high``.
    """

    def __init__(self, clip_high: float = 0.28) -> None:
        super().__init__(1.0, clip_high)

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Weight the policy gradient."""
        old = known(batch.old_logprobs, "old_logprobs")
        return cispo_surrogate(logprobs, old, advantages, self.clip_high)

    def dead(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Nowhere: the weight is clipped, the gradient stays."""
        return torch.zeros_like(batch.loss_mask)


class TrustRegionRatio(Ratio):
    """Trust Region Ratio Distillation: RLAD (arXiv 2602.22495, Eq. 3 and 4).

    ``r = (pi / pi_old)^alpha (pi / pi_T)^(1 - alpha)``. Where nothing is to be imitated, and on
    the teacher's own completions, r is rho.

    Args:
        trrd_alpha: weight of the old student's anchor, in [0, 1]; 1 is GRPO. Published: 0.5.
        offset_clamp: bound on ``|log pi_old - log pi_T|``, at least 0 [one public implementation's
            value]; None for none.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
        dual_clip: upper bound on the ratio where A < 0, above 1; None for none.
    """

    needs_teacher = True

    def __init__(
        self,
        trrd_alpha: float = 0.5,
        offset_clamp: float | None = 1.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
    ) -> None:
        super().__init__(clip_low, clip_high, dual_clip)
        if offset_clamp is not None:
            require_between("offset_clamp", offset_clamp, 0.0, float("inf"), "Use null for none.")
        self.trrd_alpha = check_coefficient("trrd_alpha", trrd_alpha)
        self.offset_clamp = offset_clamp

    @property
    def anchored(self) -> bool:
        """Whether alpha and clamp leave the teacher a say."""
        return self.trrd_alpha < 1.0 and self.offset_clamp != 0.0

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Clip TRRD's ratio."""
        old = known(batch.old_logprobs, "old_logprobs")
        return trrd_surrogate(
            logprobs,
            old,
            _anchor(batch),
            advantages,
            self.trrd_alpha,
            self.clip_low,
            self.clip_high,
            self.offset_clamp,
            self.dual_clip,
        )

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the log of TRRD's ratio."""
        old = known(batch.old_logprobs, "old_logprobs")
        return trrd_log_ratio(logprobs, old, _anchor(batch), self.trrd_alpha, self.offset_clamp)


class BehaviorRatio(Ratio):
    """``pi / mu`` with what the sampler reported, clipped: importance sampling from the teacher.

    For the teacher's completions, whose log-probabilities are at its own sampling temperature.
    """

    @property
    def to_behavior(self) -> bool:
        """It is."""
        return True

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Clip the ratio to the behavior policy."""
        behavior = known(batch.rollout_logprobs, "rollout_logprobs")
        return clipped_surrogate(
            logprobs, behavior, advantages, self.clip_low, self.clip_high, self.dual_clip
        )

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the log of pi / mu."""
        return logprobs - known(batch.rollout_logprobs, "rollout_logprobs")


class ShapedProbability(Ratio):
    """``f(pi)`` with ``f(x) = x / (x + gamma)``, unclipped: LUFFY (arXiv 2504.14945).

    For the teacher's completions.

    Args:
        gamma: where f reaches one half, above 0.
    """

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__(1.0, sys.float_info.max)
        if not 0.0 < gamma < float("inf"):
            raise ConfigurationError(f"`gamma` must be above 0: got {gamma}. 0.1 is published.")
        self.gamma = gamma

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Shape the probability."""
        return luffy_surrogate(logprobs, advantages, self.gamma)

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return log f(pi)."""
        return logsigmoid(logprobs - math.log(self.gamma))


def _anchor(batch: RolloutBatch) -> Tensor:
    """Return the teacher where it is imitated, else the old student: the ratio is then rho."""
    teacher = known(batch.teacher_logprobs, "teacher_logprobs")
    if batch.imitation_mask is None:
        return teacher
    old = known(batch.old_logprobs, "old_logprobs")
    return torch.where(batch.imitation_mask & batch.student_mask, teacher, old)
