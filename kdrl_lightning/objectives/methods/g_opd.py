"""G-OPD and ExOPD: on-policy distillation towards a teacher extrapolated from a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.errors import require_between
from kdrl_lightning.losses.advantages import extrapolated
from kdrl_lightning.losses.teacher_chunks import chunk_totals
from kdrl_lightning.objectives.advantages import GapAdvantage
from kdrl_lightning.objectives.base import known
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio
from kdrl_lightning.rollout_batch import RolloutBatch


class ExtrapolatedGap(GapAdvantage):
    """Gives ``d + (extrapolation - 1) (log pi_T - log pi_ref)``: G-OPD (arXiv 2602.12125).

    Args:
        extrapolation: lambda, at least 0: 1 is on-policy distillation, above 1 is ExOPD. Published:
            1.25.

    Raises:
        ConfigurationError: ``extrapolation`` is negative.
    """

    needs_reference = True

    def __init__(self, extrapolation: float = 1.25) -> None:
        super().__init__()
        require_between("extrapolation", extrapolation, 0.0, float("inf"), "1.25 is published.")
        self.extrapolation = extrapolation

    def __call__(self, batch: RolloutBatch, gap: Tensor) -> Tensor:
        """Return the extrapolated gap; 0 on tokens that are not imitated."""
        mask = known(batch.imitation_mask, "imitation_mask") & batch.student_mask
        teacher = known(batch.teacher_logprobs, "teacher_logprobs")
        reference = chunk_totals(known(batch.ref_logprobs, "ref_logprobs"), batch.chunk_places)
        return torch.where(mask, extrapolated(gap, teacher, reference, self.extrapolation), 0.0)


class GOPD(PolicyObjective):
    """G-OPD: on-policy distillation with a second anchor, the reference (arXiv 2602.12125).

    ``-min(rho a, clip(rho, 1 - clip_low, 1 + clip_high) a)`` per token, with the detached advantage
    ``a = log pi_T - log pi + (extrapolation - 1) (log pi_T - log pi_ref)``. The optimum is
    ``pi_T^extrapolation pi_ref^(1 - extrapolation)``, normalised. pi_ref is the module's
    ``reference``, by default the student before training. With an ``extrapolation`` above 1 the
    method is ExOPD. Rewards are measured but do not enter the loss.

    Args:
        extrapolation: see ``ExtrapolatedGap``.
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``.
        dual_clip: see ``TokenRatio``.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        extrapolation: float = 1.25,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high, dual_clip),
            advantage=ExtrapolatedGap(extrapolation),
            **policy,
        )
