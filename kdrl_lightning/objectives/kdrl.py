"""KDRL: GRPO plus reverse KL to a teacher on the student's own rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from kdrl_lightning.errors import require_between
from kdrl_lightning.objectives.base import Reduction, Term, TokenScores, known
from kdrl_lightning.objectives.distillation import reverse_kl_loss
from kdrl_lightning.objectives.grpo import GRPO
from kdrl_lightning.rollout_batch import RolloutBatch


class KDRL(GRPO):
    """Knowledge distillation and RL in one loss (arXiv 2506.02208, Eq. 8).

    ``GRPO + teacher_kl_coef * k2(student, teacher)``. At ratio 1 its gradient is that of a policy
    gradient with per-token advantage ``A + teacher_kl_coef * (log pi_T - log pi)``.

    Args:
        teacher_kl_coef: weight of the KL term, at least 0. Published: 2e-3 constant, or 5e-3
            annealed to 1e-3 (see ``KLCoefficientAnnealing``); 0.2 on Knights and Knaves.
        kd_ratio_weight: weight the KL term by the detached ratio, which keeps it unbiased with
            several updates per rollout [our choice]. Without effect at the first update.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
        scale_by_std: divide advantages by the group's standard deviation.
        reduction: the paper takes ``group_token_mean``.
        entropy_coef: weight of the entropy bonus.
    """

    needs_teacher: ClassVar[bool] = True

    def __init__(
        self,
        teacher_kl_coef: float = 2e-3,
        kd_ratio_weight: bool = False,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        scale_by_std: bool = True,
        reduction: Reduction = "token_mean",
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(clip_low, clip_high, scale_by_std, reduction, entropy_coef)
        require_between("teacher_kl_coef", teacher_kl_coef, 0.0, float("inf"))
        self.teacher_kl_coef = teacher_kl_coef
        self.kd_ratio_weight = kd_ratio_weight

    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the clipped surrogate and the reverse KL."""
        yield from super().terms(batch, scores)
        per_token = reverse_kl_loss(batch, scores, self.kd_ratio_weight)
        mask = known(batch.imitation_mask, "imitation_mask")
        yield Term("teacher_kl", per_token, self.teacher_kl_coef, mask)

    def imitated(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the tokens of the KL term."""
        mask = known(batch.imitation_mask, "imitation_mask") & batch.loss_mask
        return mask if self.teacher_kl_coef else mask & False
