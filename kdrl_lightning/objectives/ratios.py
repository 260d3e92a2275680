"""Ratio rules: the ratio that multiplies the advantage, and its clip."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from typing import Literal

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
from kdrl_lightning.losses.ratios import refuse_two_clamps
from kdrl_lightning.losses.teacher_chunks import whole_chunks
from kdrl_lightning.objectives.base import Part, check_coefficient, known, teacher_logprobs
from kdrl_lightning.rollout_batch import RolloutBatch


class Ratio(Part):
    """A ratio r with the loss ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` per token.

    Args:
        clip_low: the ratio is clipped below at ``1 - clip_low``, in [0, 1].
        clip_high: the ratio is clipped above at ``1 + clip_high``, at least 0.
        dual_clip: upper bound on the ratio for A < 0, above 1 (arXiv 1912.09729); None: no bound.

    Raises:
        ConfigurationError: a value is out of its range.
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
        """Whether the teacher enters the ratio."""
        return False

    @property
    def to_behavior(self) -> bool:
        """Whether the ratio divides by the engine's probabilities, so it needs no correction."""
        return False

    @abstractmethod
    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return the ``[B, T]`` surrogate for advantages ``[B, T]``."""

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the ``[B, T]`` log of the ratio."""
        return logprobs - known(batch.old_logprobs, "old_logprobs")

    def outside(self, batch: RolloutBatch, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Return two ``[B, T]`` masks: ratio below and ratio above the clip range."""
        log_ratio = self.log_ratio(batch, logprobs)
        low = math.log1p(-self.clip_low) if self.clip_low < 1.0 else -math.inf
        return log_ratio < low, log_ratio > math.log1p(self.clip_high)

    def dead(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return ``[B, T]`` bool: the clip removes the token's gradient."""
        below, above = self.outside(batch, logprobs)
        far = torch.zeros_like(above)
        if self.dual_clip is not None:
            far = self.log_ratio(batch, logprobs) > math.log(self.dual_clip)
        return torch.where(advantages < 0, below | far, above & (advantages > 0))


class TokenRatio(Ratio):
    """PPO's ratio per token, ``rho = pi / pi_old``: GRPO (arXiv 2402.03300).

    DAPO (2503.14476) sets ``clip_high`` to 0.28.
    """

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return the surrogate with a clipped rho."""
        old = known(batch.old_logprobs, "old_logprobs")
        return clipped_surrogate(
            logprobs, old, advantages, self.clip_low, self.clip_high, self.dual_clip
        )


class SequenceRatio(Ratio):
    """One ratio per completion, ``(pi / pi_old)^(1/|o|)``: GSPO (arXiv 2507.18071).

    Args:
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
    """

    couples_tokens = True

    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4) -> None:
        super().__init__(clip_low, clip_high)

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return the surrogate with a clipped sequence ratio."""
        old = known(batch.old_logprobs, "old_logprobs")
        return sequence_surrogate(
            logprobs, old, advantages, batch.loss_mask, self.clip_low, self.clip_high
        )

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the log of the completion's ratio, at each of its tokens."""
        old = known(batch.old_logprobs, "old_logprobs")
        return sequence_log_ratio(logprobs, old, batch.loss_mask)


class WeightRatio(Ratio):
    """A weight for ``A log pi``: ``pi / pi_old``, clipped and detached: CISPO (arXiv 2506.13585).

    Args:
        clip_high: the weight is at most ``1 + clip_high``.
    """

    def __init__(self, clip_high: float = 0.28) -> None:
        super().__init__(1.0, clip_high)

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return the weighted policy gradient loss."""
        old = known(batch.old_logprobs, "old_logprobs")
        return cispo_surrogate(logprobs, old, advantages, self.clip_high)

    def dead(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return False everywhere: the clip acts on the weight and removes no gradient."""
        return torch.zeros_like(batch.loss_mask)


class TrustRegionRatio(Ratio):
    """Trust Region Ratio Distillation's ratio: RLAD (arXiv 2602.22495, Eq. 3 and 4).

    ``r = (pi / pi_old)^alpha (pi / pi_T)^(1 - alpha)``. On tokens that are not imitated, and on the
    teacher's completions, r is ``rho = pi / pi_old``.

    Args:
        trrd_alpha: weight of the old student's anchor, in [0, 1]; 1 is GRPO. Published: 0.5.
        offset_clamp: bound on the old student's ``|log pi_old - log pi_T|`` in nats, at least 0
            [our choice], in place of ``log_ratio_clamp``.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
        dual_clip: upper bound on the ratio for A < 0, above 1; None: no bound.
        log_ratio_clamp: bound on the current student's ``|log pi - log pi_T|`` in nats, inside the
            graph; ``auto``: 1.0 as published (App. B), and none with an ``offset_clamp``; None: no
            bound. ``trrd_log_ratio`` compares the two clamps.

    Raises:
        ConfigurationError: a value is out of its range, or both clamps are given.
    """

    needs_teacher = True

    def __init__(
        self,
        trrd_alpha: float = 0.5,
        offset_clamp: float | None = None,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        log_ratio_clamp: float | Literal["auto"] | None = "auto",
    ) -> None:
        super().__init__(clip_low, clip_high, dual_clip)
        if log_ratio_clamp == "auto":
            log_ratio_clamp = 1.0 if offset_clamp is None else None
        for name, clamp in ("offset_clamp", offset_clamp), ("log_ratio_clamp", log_ratio_clamp):
            if clamp is not None:
                require_between(name, clamp, 0.0, float("inf"), "Use null for none.")
        refuse_two_clamps(offset_clamp, log_ratio_clamp)
        self.trrd_alpha = check_coefficient("trrd_alpha", trrd_alpha)
        self.offset_clamp = offset_clamp
        self.log_ratio_clamp = log_ratio_clamp

    @property
    def anchored(self) -> bool:
        """Whether the teacher enters the ratio: alpha is below 1 and no clamp is 0."""
        return self.trrd_alpha < 1.0 and 0.0 not in (self.offset_clamp, self.log_ratio_clamp)

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return the surrogate with TRRD's clipped ratio."""
        teacher, alpha = self._anchor(batch, logprobs)
        return trrd_surrogate(
            logprobs,
            known(batch.old_logprobs, "old_logprobs"),
            teacher,
            advantages,
            alpha,
            self.clip_low,
            self.clip_high,
            self.offset_clamp,
            self.dual_clip,
            self.log_ratio_clamp,
        )

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the log of TRRD's ratio."""
        old = known(batch.old_logprobs, "old_logprobs")
        teacher, alpha = self._anchor(batch, logprobs)
        return trrd_log_ratio(
            logprobs, old, teacher, alpha, self.offset_clamp, self.log_ratio_clamp
        )

    def clamped(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor | None:
        """Return ``[B, T]`` bool: the clamp acts on the token; None without a clamp."""
        clamp = self.log_ratio_clamp or self.offset_clamp
        if not clamp:
            return None
        student = logprobs
        if self.log_ratio_clamp is None:
            student = known(batch.old_logprobs, "old_logprobs")
        far = student - teacher_logprobs(batch, student)
        return (far.abs() > clamp) & self._imitated(batch) & self.anchored

    def _anchor(self, batch: RolloutBatch, logprobs: Tensor) -> tuple[Tensor, float | Tensor]:
        """Return teacher ``[B, T]`` and alpha such that the ratio is rho on tokens not imitated."""
        if self.log_ratio_clamp is not None:
            teacher = teacher_logprobs(batch, logprobs)
            if batch.imitation_mask is None:
                return teacher, self.trrd_alpha
            # With the old student as anchor, the clamp would act on log rho. We replace the
            # teacher because it may be NaN on these tokens, and 0 * NaN is NaN.
            imitated, alpha = self._imitated(batch), teacher.new_full((), self.trrd_alpha)
            teacher = torch.where(imitated, teacher, logprobs.detach())
            return teacher, torch.where(imitated, alpha, 1.0)
        old = known(batch.old_logprobs, "old_logprobs")
        teacher = teacher_logprobs(batch, old)
        if batch.imitation_mask is None:
            return teacher, self.trrd_alpha
        return torch.where(self._imitated(batch), teacher, old), self.trrd_alpha

    def _imitated(self, batch: RolloutBatch) -> Tensor:
        if batch.imitation_mask is None:
            return whole_chunks(batch.student_mask, batch.chunk_places)
        return batch.imitation_mask & batch.student_mask


class BehaviorRatio(Ratio):
    """The clipped ratio ``pi / mu`` to the sampler's probabilities mu: importance sampling.

    Use it as ``teacher_tokens``. For the teacher's completions, mu is taken at the teacher's
    sampling temperature.
    """

    @property
    def to_behavior(self) -> bool:
        """Return True."""
        return True

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return the surrogate with the clipped ratio to the behavior policy."""
        behavior = known(batch.rollout_logprobs, "rollout_logprobs")
        return clipped_surrogate(
            logprobs, behavior, advantages, self.clip_low, self.clip_high, self.dual_clip
        )

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the log of pi / mu."""
        return logprobs - known(batch.rollout_logprobs, "rollout_logprobs")


class ShapedProbability(Ratio):
    """LUFFY's unclipped ``f(pi)`` with ``f(x) = x / (x + gamma)`` (arXiv 2504.14945).

    Use it as ``teacher_tokens``.

    Args:
        gamma: probability at which f is one half, above 0. Published: 0.1.

    Raises:
        ConfigurationError: ``gamma`` is not above 0.
    """

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__(1.0, sys.float_info.max)
        if not 0.0 < gamma < float("inf"):
            raise ConfigurationError(f"`gamma` must be above 0: got {gamma}. The paper uses 0.1.")
        self.gamma = gamma

    def loss(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return the surrogate with the shaped probability."""
        return luffy_surrogate(logprobs, advantages, self.gamma)

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return log f(pi)."""
        return logsigmoid(logprobs - math.log(self.gamma))
