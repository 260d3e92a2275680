"""SDAR: GRPO plus the teacher's gap on sampled tokens, gated by a sigmoid of the gap."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.errors import require_between
from kdrl_lightning.losses import TokenScores, gate
from kdrl_lightning.losses.teacher_chunks import chunk_share
from kdrl_lightning.objectives.advantages import Advantage
from kdrl_lightning.objectives.base import check_coefficient, teacher_logprobs
from kdrl_lightning.objectives.divergences import DistillTerm
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio
from kdrl_lightning.rollout_batch import RolloutBatch


class GatedGap(DistillTerm):
    """The gap ``g (log pi_T - log pi)`` with a detached gate g: SDAR's term (arXiv 2605.15155).

    ``g = sigmoid(sharpness (log pi_T - log pi))``. The gradient with respect to ``log pi`` is
    ``-g``: it makes every sampled token more probable, most of all those that the teacher prefers.
    The value can be negative, so it is not a divergence.

    Args:
        distill_coef: weight of the term, at least 0. The examples of the published code use 0.01.
        sharpness: factor on the gap, at least 0; at 0 the expected gradient is zero.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    name = "gated_gap"
    sampled = True
    per_imitated_token = False

    def __init__(self, distill_coef: float = 0.01, sharpness: float = 5.0) -> None:
        require_between("sharpness", sharpness, 0.0, float("inf"))
        self.distill_coef = check_coefficient("distill_coef", distill_coef)
        self.sharpness = sharpness

    @property
    def coef(self) -> float:
        """Weight of the term in the loss."""
        return self.distill_coef

    def where(self, batch: RolloutBatch) -> Tensor:
        """Return the imitated tokens that the student sampled."""
        return super().where(batch) & batch.student_mask

    def per_token(self, batch: RolloutBatch, scores: TokenScores, mask: Tensor) -> Tensor:
        """Return the gated gap at each sampled token."""
        teacher = teacher_logprobs(batch, scores.logprobs).detach()
        gap = torch.where(mask, teacher, scores.logprobs.detach()) - scores.logprobs
        return chunk_share(gate(gap, self.sharpness) * gap, batch.chunk_places)


class SDAR(PolicyObjective):
    """SDAR: GRPO plus a term that raises sampled tokens, gated by the teacher (arXiv 2605.15155).

    GRPO's surrogate plus ``distill_coef g (log pi_T - log pi)``, with the detached gate
    ``g = sigmoid(sharpness (log pi_T - log pi))``. We follow the published code, in which the
    teacher is the student at rollout time with a skill text in its prompt.

    Args:
        distill_coef: see ``GatedGap``.
        sharpness: see ``GatedGap``.
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``.
        scale_by_std: see ``Advantage``.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        distill_coef: float = 0.01,
        sharpness: float = 5.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        scale_by_std: bool = True,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high),
            advantage=Advantage(scale_by_std),
            distill=GatedGap(distill_coef, sharpness),
            **policy,
        )
