"""RLAD: selective imitation through Trust Region Ratio Distillation."""

from __future__ import annotations

from typing import Any

from kdrl_lightning.objectives.advantages import Advantage
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TrustRegionRatio


class RLAD(PolicyObjective):
    """RL-aware distillation (arXiv 2602.22495, Eq. 3 and 4), by default without a reference KL.

    The clipped surrogate of GRPO with a ratio anchored at the old student and at the teacher: a
    rewarded token that the teacher dislikes is not reinforced, a punished one that it likes is
    protected. An ``offset_clamp`` c takes an edge away: the first where ``(1 - alpha) c`` is below
    ``log(1 + clip_high)``, the second where it is below ``-log(1 - clip_low)``. Run it with 2 to 4
    updates per rollout: the fence acts on what they can use.

    Args:
        trrd_alpha: weight of the old student's anchor, in [0, 1]; 1 is GRPO. Published: 0.5.
        offset_clamp: bound on ``|log pi_old - log pi_T|``, at least 0 [one public implementation's
            value]; None for none.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
        dual_clip: upper bound on the ratio where A < 0, above 1; None for none.
        scale_by_std: divide advantages by the group's standard deviation.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        trrd_alpha: float = 0.5,
        offset_clamp: float | None = 1.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        scale_by_std: bool = True,
        **policy: Any,
    ) -> None:
        ratio = TrustRegionRatio(trrd_alpha, offset_clamp, clip_low, clip_high, dual_clip)
        super().__init__(ratio, Advantage(scale_by_std), **policy)
