"""GRPO and its variants: a clipped policy gradient with group-relative advantages, no teacher."""

from __future__ import annotations

from typing import Any

from kdrl_lightning.objectives.advantages import Advantage
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import SequenceRatio, TokenRatio, WeightRatio


class GRPO(PolicyObjective):
    """Group Relative Policy Optimization (arXiv 2402.03300), by default without a reference KL.

    Dr.GRPO (2503.20783): ``scale_by_std: false, reduction: constant_length``. DAPO (2503.14476):
    ``clip_high: 0.28``. LUFFY (2504.14945): ``teacher_tokens: ShapedProbability``.

    Args:
        clip_low: the ratio is clipped below at ``1 - clip_low``, in [0, 1].
        clip_high: the ratio is clipped above at ``1 + clip_high``, at least 0.
        dual_clip: upper bound on the ratio where A < 0, above 1; None for none.
        scale_by_std: divide advantages by the group's standard deviation.
        policy: further settings of ``PolicyObjective``. The paper takes ``sequence_mean`` for
            ``reduction``; the default is DAPO's global token mean.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        scale_by_std: bool = True,
        **policy: Any,
    ) -> None:
        super().__init__(
            TokenRatio(clip_low, clip_high, dual_clip), Advantage(scale_by_std), **policy
        )


class GSPO(PolicyObjective):
    """Group Sequence Policy Optimization (arXiv 2507.18071): one ratio per completion.

    Args:
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
        scale_by_std: divide advantages by the group's standard deviation.
        policy: further settings of ``PolicyObjective``. The paper takes ``sequence_mean`` for
            ``reduction``.
    """

    def __init__(
        self,
        clip_low: float = 3e-4,
        clip_high: float = 4e-4,
        scale_by_std: bool = True,
        **policy: Any,
    ) -> None:
        super().__init__(SequenceRatio(clip_low, clip_high), Advantage(scale_by_std), **policy)


class CISPO(PolicyObjective):
    """Clipped importance weights, unclipped gradients (arXiv 2506.13585).

    Args:
        clip_high: the weight is at most ``1 + clip_high`` [our choice: DAPO's value].
        scale_by_std: divide advantages by the group's standard deviation.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(self, clip_high: float = 0.28, scale_by_std: bool = True, **policy: Any) -> None:
        super().__init__(WeightRatio(clip_high), Advantage(scale_by_std), **policy)
