"""SDPO: a divergence over the student's top tokens, weighted by a capped ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.errors import require_between
from kdrl_lightning.losses import TokenScores, capped_ratio
from kdrl_lightning.objectives.advantages import Advantage
from kdrl_lightning.objectives.base import known
from kdrl_lightning.objectives.divergences import VocabularyKL
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio
from kdrl_lightning.rollout_batch import RolloutBatch


class CappedKL(VocabularyKL):
    """A divergence of distributions, times the token's ratio ``sg(min(pi / pi_old, ratio_cap))``.

    SDPO (arXiv 2601.20802) weights the divergence at a position by the ratio of the token sampled
    there. ``engine_correction`` weights it, too.

    Args:
        teacher_kl_coef: weight of the term, at least 0.
        jsd_beta: see ``VocabularyKL``.
        top_k: see ``VocabularyKL``.
        ratio_cap: largest ratio, at least 1; None: no ratio.
        per_imitated_token: divide by the step's imitated tokens, whatever the ``reduction``.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    def __init__(
        self,
        teacher_kl_coef: float = 1.0,
        jsd_beta: float = 0.5,
        top_k: int | None = 100,
        ratio_cap: float | None = 2.0,
        per_imitated_token: bool = True,
    ) -> None:
        super().__init__(teacher_kl_coef, jsd_beta, top_k, per_imitated_token)
        if ratio_cap is not None:
            require_between("ratio_cap", ratio_cap, 1.0, float("inf"), "2 is published.")
        self.ratio_cap = ratio_cap

    @property
    def corrected(self) -> bool:
        """Return True: the weights depend on the sampled tokens."""
        return True

    def per_token(self, batch: RolloutBatch, scores: TokenScores, mask: Tensor) -> Tensor:
        """Return the weighted divergence at each position."""
        divergence = super().per_token(batch, scores, mask)
        if self.ratio_cap is None:
            return divergence
        old = torch.where(mask, known(batch.old_logprobs, "old_logprobs"), scores.logprobs)
        return divergence * capped_ratio(scores.logprobs, old, self.ratio_cap)


class SDPO(PolicyObjective):
    """Self-Distillation Policy Optimization: a divergence over the student's top tokens.

    arXiv 2601.20802: the generalised Jensen-Shannon divergence over the student's ``top_k`` most
    likely tokens and a bucket for the rest, times ``sg(min(pi / pi_old, ratio_cap))``, divided by
    the distilled tokens of the step. As published the teacher is a moving average of the student
    with a successful sibling or feedback in its prompt; completions without either are not
    distilled.

    With ``reward_mix`` above 0 (the hybrid) the loss is ``reward_mix`` times GRPO's loss plus
    ``1 - reward_mix`` times that divergence.

    Args:
        reward_mix: lambda, in [0, 1]: 0 is distillation alone. Published for the hybrid: 0.9.
        jsd_beta: see ``VocabularyKL``. Published: 0.5, with rich feedback 1.
        top_k: see ``VocabularyKL``. Published: 100, with rich feedback 20.
        ratio_cap: see ``CappedKL``. Published: 2.
        clip_low: see ``TokenRatio``; for the hybrid.
        clip_high: see ``TokenRatio``; for the hybrid.
        scale_by_std: see ``Advantage``; for the hybrid. Published: false.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        reward_mix: float = 0.0,
        jsd_beta: float = 0.5,
        top_k: int | None = 100,
        ratio_cap: float | None = 2.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        scale_by_std: bool = False,
        **policy: PolicySetting,
    ) -> None:
        require_between("reward_mix", reward_mix, 0.0, 1.0, "0 is distillation alone.")
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high) if reward_mix else None,
            advantage=Advantage(scale_by_std) if reward_mix else None,
            distill=CappedKL(1.0 - reward_mix, jsd_beta, top_k, ratio_cap),
            rl_coef=reward_mix,
            **policy,
        )
