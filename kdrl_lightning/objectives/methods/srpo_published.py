"""SRPO as published: GRPO, plus a confidence-weighted divergence on distilled completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.errors import require_between
from kdrl_lightning.losses import TokenScores, confidence
from kdrl_lightning.objectives.advantages import Advantage
from kdrl_lightning.objectives.base import known
from kdrl_lightning.objectives.methods.sdpo import CappedKL
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio
from kdrl_lightning.objectives.selections import Selection, WrongCompletions
from kdrl_lightning.rollout_batch import RolloutBatch


class ConfidenceWeightedKL(CappedKL):
    """``CappedKL`` with weights ``e^(-sharpness H_T)`` per token, H_T being the teacher's entropy.

    As in SRPO (arXiv 2604.02288), the weights are divided by their mean over the distilled tokens
    of the whole optimizer step.

    Args:
        teacher_kl_coef: weight of the term, at least 0.
        jsd_beta: see ``VocabularyKL``.
        top_k: see ``VocabularyKL``.
        ratio_cap: see ``CappedKL``.
        sharpness: factor on the entropy, at least 0; 0 weights all tokens alike.
        per_imitated_token: divide by the step's imitated tokens, whatever the ``reduction``.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    needs_teacher_entropy = True
    reads_old_scores = True

    def __init__(
        self,
        teacher_kl_coef: float = 1.0,
        jsd_beta: float = 0.5,
        top_k: int | None = 100,
        ratio_cap: float | None = 2.0,
        sharpness: float = 1.0,
        per_imitated_token: bool = False,
    ) -> None:
        super().__init__(teacher_kl_coef, jsd_beta, top_k, ratio_cap, per_imitated_token)
        require_between("sharpness", sharpness, 0.0, float("inf"), "1 is published.")
        self.sharpness = sharpness

    def weights(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B, T]`` weights, not yet divided by their mean over the step."""
        return confidence(known(rollout.teacher_entropy, "teacher_entropy"), self.sharpness)

    def per_token(self, batch: RolloutBatch, scores: TokenScores, mask: Tensor) -> Tensor:
        """Return the weighted divergence at each position."""
        totals = known(batch.totals, "totals")
        weights = known(batch.imitation_weights, "imitation_weights")
        mean = totals.imitation_weight / max(totals.num_imitated_tokens, 1)
        weights = torch.where(mask, weights / mean, 0.0) if mean else torch.zeros_like(weights)
        return weights * super().per_token(batch, scores, mask)


class NotDistilled(Advantage):
    """Gives A to tokens that are not distilled, and 0 to the others: SRPO (arXiv 2604.02288).

    Args:
        scale_by_std: divide A by the group's standard deviation.
    """

    def __call__(self, batch: RolloutBatch, gap: Tensor) -> Tensor:
        """Return A, or 0 where the distillation term acts."""
        mask = known(batch.imitation_mask, "imitation_mask")
        return torch.where(mask, 0.0, super().__call__(batch, gap))


class PublishedSRPO(PolicyObjective):
    """SRPO as published: wrong completions with a context are distilled, the others get GRPO.

    arXiv 2604.02288. On distilled completions the loss of a token is
    ``w min(pi / pi_old, ratio_cap) JSD``, with the divergence of SDPO and
    ``w = e^(-sharpness H_T)``, divided by its mean over the distilled tokens of the step. On all
    others it is GRPO's surrogate, also on wrong completions without a context. Both are divided by
    the number of loss tokens of the step. ``SRPO`` is the form with an external teacher.

    Args:
        sharpness: see ``ConfidenceWeightedKL``. Published: 1.
        jsd_beta: see ``VocabularyKL``. Published: 0.5.
        top_k: see ``VocabularyKL``. Published: 100.
        ratio_cap: see ``CappedKL``. Published: 2.
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``. Published: 0.28.
        scale_by_std: see ``Advantage``. The experiments of the paper leave the division out.
        selection: further rules for the completions to distil, in addition to ``WrongCompletions``.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        sharpness: float = 1.0,
        jsd_beta: float = 0.5,
        top_k: int | None = 100,
        ratio_cap: float | None = 2.0,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        scale_by_std: bool = False,
        selection: Sequence[Selection] = (),
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high),
            advantage=NotDistilled(scale_by_std),
            distill=ConfidenceWeightedKL(1.0, jsd_beta, top_k, ratio_cap, sharpness),
            selection=(WrongCompletions(), *selection),
            **policy,
        )
