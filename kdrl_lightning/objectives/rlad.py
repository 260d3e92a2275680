"""RLAD: selective imitation through Trust Region Ratio Distillation."""

from __future__ import annotations

from typing import Literal

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.objectives.advantages import Advantage
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TrustRegionRatio


class RLAD(PolicyObjective):
    """RLAD: RL-aware distillation, with the teacher in the ratio (arXiv 2602.22495, Eq. 3 and 4).

    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` per token, with A the group-relative
    advantage and ``r = (pi / pi_old)^alpha (pi / pi_T)^(1 - alpha)``. Eq. 4 also has a reference
    KL, which is off by default.

    RLAD does not reinforce a rewarded token that the teacher finds improbable, and does not
    suppress a punished token that the teacher finds probable. At rho = 1 a clamp below
    ``log(1 + clip_high) / (1 - alpha)`` removes the first effect, and one below
    ``-log(1 - clip_low) / (1 - alpha)`` the second. Run RLAD with 2 to 4 updates per rollout: the
    clip range that the teacher widens matters only after the first. To add this surrogate to
    another loss, use ``SurrogateTerm``.

    As published: ``clip_high: 0.28``, ``reduction: sequence_mean``, and
    ``rl_coef: sqrt(G / (G - 1))`` for groups of G completions, because the paper divides by the
    population's standard deviation (``rlad_published.yaml``).

    Args:
        trrd_alpha: alpha, see ``TrustRegionRatio``. Published: 0.5.
        offset_clamp: see ``TrustRegionRatio``.
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``.
        dual_clip: see ``TokenRatio``.
        scale_by_std: see ``Advantage``.
        log_ratio_clamp: see ``TrustRegionRatio``.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        trrd_alpha: float = 0.5,
        offset_clamp: float | None = None,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        scale_by_std: bool = True,
        log_ratio_clamp: float | Literal["auto"] | None = "auto",
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=TrustRegionRatio(
                trrd_alpha, offset_clamp, clip_low, clip_high, dual_clip, log_ratio_clamp
            ),
            advantage=Advantage(scale_by_std),
            **policy,
        )
