"""GRPO, GSPO and CISPO: policy gradients with group-relative advantages and without a teacher."""

from __future__ import annotations

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.objectives.advantages import Advantage
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import SequenceRatio, TokenRatio, WeightRatio


class GRPO(PolicyObjective):
    """Group Relative Policy Optimization (arXiv 2402.03300, Eq. 3).

    ``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)`` per token, with ``rho = pi / pi_old``
    and A the group-relative advantage; by default without a reference KL.

    For Dr.GRPO (2503.20783) set ``scale_by_std: false`` and ``reduction: constant_length``; for
    DAPO (2503.14476) set ``clip_high: 0.28``; for LUFFY (2504.14945) set
    ``teacher_tokens: ShapedProbability``.

    Args:
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``.
        dual_clip: see ``TokenRatio``.
        scale_by_std: see ``Advantage``.
        policy: further settings of ``PolicyObjective``. The paper uses ``sequence_mean`` for
            ``reduction``; the default is DAPO's global token mean.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        scale_by_std: bool = True,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high, dual_clip),
            advantage=Advantage(scale_by_std),
            **policy,
        )


class GSPO(PolicyObjective):
    """Group Sequence Policy Optimization, with one ratio per completion (arXiv 2507.18071).

    ``-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)`` on each token of a completion o, with
    ``s = (pi(o) / pi_old(o))^(1 / |o|)``.

    Args:
        clip_low: see ``SequenceRatio``.
        clip_high: see ``SequenceRatio``.
        scale_by_std: see ``Advantage``.
        policy: further settings of ``PolicyObjective``. The paper uses ``sequence_mean`` for
            ``reduction``.
    """

    def __init__(
        self,
        clip_low: float = 3e-4,
        clip_high: float = 4e-4,
        scale_by_std: bool = True,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=SequenceRatio(clip_low, clip_high),
            advantage=Advantage(scale_by_std),
            **policy,
        )


class CISPO(PolicyObjective):
    """CISPO: a policy gradient with clipped importance weights (MiniMax-M1, arXiv 2506.13585).

    ``-min(rho, 1 + clip_high) A log pi`` per token. The weight carries no gradient, and the clip
    removes no token's gradient.

    Args:
        clip_high: see ``WeightRatio`` [our choice: DAPO's value].
        scale_by_std: see ``Advantage``.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self, clip_high: float = 0.28, scale_by_std: bool = True, **policy: PolicySetting
    ) -> None:
        super().__init__(ratio=WeightRatio(clip_high), advantage=Advantage(scale_by_std), **policy)
