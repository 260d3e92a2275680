"""SRPO and RLSD: advantages mixed from rewards and teacher.

Both were published as self-distillation; we follow arXiv 2609.04108, which has an external teacher.
"""

from __future__ import annotations

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.objectives.advantages import ReweightedAdvantage, VerdictAdvantage
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio


class SRPO(PolicyObjective):
    """SRPO: rewards train the correct completions, the teacher the wrong ones (arXiv 2604.02288).

    It is GRPO's surrogate with the advantage ``c A + (1 - c) d`` per token: c is 1 if the verifier
    accepts the completion, else 0, and ``d = log pi_T - log pi``, without gradient.

    Args:
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``.
        scale_by_std: see ``Advantage``.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        scale_by_std: bool = True,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high),
            advantage=VerdictAdvantage(scale_by_std),
            **policy,
        )


class RLSD(PolicyObjective):
    """RLSD: the teacher scales each token's advantage and keeps its sign (arXiv 2604.03128).

    It is GRPO's surrogate with the advantage
    ``A ((1 - mix) + mix clip(e^(sign(A) d), 1 - width, 1 + width))`` per token, with
    ``d = log pi_T - log pi``, without gradient.

    Args:
        mix: lambda, in [0, 1]; 0 is GRPO. Published: falling from 0.5 to 0, or 1 in 2609.04108.
        width: eps_w, in [0, 1]. Published: 0.2.
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``.
        scale_by_std: see ``Advantage``.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        mix: float = 0.5,
        width: float = 0.2,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        scale_by_std: bool = True,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high),
            advantage=ReweightedAdvantage(mix, width, scale_by_std),
            **policy,
        )
