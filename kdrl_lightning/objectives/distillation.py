"""On-policy distillation: reverse KL to a teacher on the student's own rollouts, without reward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from kdrl_lightning.errors import require_between
from kdrl_lightning.losses import k2
from kdrl_lightning.objectives.base import Objective, Reduction, Term, TokenScores, known
from kdrl_lightning.rollout_batch import RolloutBatch


def reverse_kl_loss(batch: RolloutBatch, scores: TokenScores, ratio_weight: bool) -> Tensor:
    """``[B, T]`` k2 loss on imitated tokens, weighted by the detached ratio where asked for."""
    mask = known(batch.imitation_mask, "imitation_mask")
    teacher = known(batch.teacher_logprobs, "teacher_logprobs")
    # Where nothing is imitated the teacher is ignored, even if its value there is -inf.
    teacher = torch.where(mask, teacher, scores.logprobs.detach())
    per_token = k2(scores.logprobs, teacher)
    if not ratio_weight:
        return per_token
    old = known(batch.old_logprobs, "old_logprobs")
    return per_token * (scores.logprobs - old).detach().exp()


class OnPolicyDistillation(Objective):
    """KD-RKL, the distillation baseline of KDRL (arXiv 2506.02208, section 2.2).

    Rewards are measured but do not enter the loss.

    Args:
        teacher_kl_coef: weight of the KL term, at least 0.
        kd_ratio_weight: weight the term by the detached ratio, which keeps it unbiased with several
            updates per rollout [our choice].
        reduction: how per-token values become one number.
        entropy_coef: weight of the entropy bonus.
    """

    needs_teacher: ClassVar[bool] = True

    def __init__(
        self,
        teacher_kl_coef: float = 1.0,
        kd_ratio_weight: bool = False,
        reduction: Reduction = "token_mean",
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(reduction, entropy_coef)
        require_between("teacher_kl_coef", teacher_kl_coef, 0.0, float("inf"))
        self.teacher_kl_coef = teacher_kl_coef
        self.kd_ratio_weight = kd_ratio_weight

    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the reverse KL."""
        per_token = reverse_kl_loss(batch, scores, self.kd_ratio_weight)
        mask = known(batch.imitation_mask, "imitation_mask")
        yield Term("teacher_kl", per_token, self.teacher_kl_coef, mask)

    def imitated(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the tokens of the KL term."""
        mask = known(batch.imitation_mask, "imitation_mask") & batch.loss_mask
        return mask if self.teacher_kl_coef else mask & False
