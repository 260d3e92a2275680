"""RLAD: selective imitation through Trust Region Ratio Distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from kdrl_lightning.errors import require_between
from kdrl_lightning.losses import trrd_log_ratio, trrd_surrogate
from kdrl_lightning.objectives.base import Reduction, Term, TokenScores, known
from kdrl_lightning.objectives.grpo import GRPO
from kdrl_lightning.rollout_batch import RolloutBatch


class RLAD(GRPO):
    """RL-aware distillation (arXiv 2602.22495, Eq. 3 and 4), without a reference KL.

    The clipped surrogate of GRPO with a ratio anchored at the old student and at the teacher: a
    rewarded token that the teacher dislikes is not reinforced, a punished one that it likes is
    protected. Run it with 2 to 4 updates per rollout: the fence acts on what they can use.

    Args:
        trrd_alpha: weight of the old student's anchor, in [0, 1]; 1 is GRPO. Published: 0.5.
        offset_clamp: bound on ``|log pi_old - log pi_T|``, at least 0 [one public implementation's
            value]; None for none.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
        scale_by_std: divide advantages by the group's standard deviation.
        reduction: how per-token values become one number.
        entropy_coef: weight of the entropy bonus.
    """

    needs_teacher: ClassVar[bool] = True

    def __init__(
        self,
        trrd_alpha: float = 0.5,
        offset_clamp: float | None = 1.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        scale_by_std: bool = True,
        reduction: Reduction = "token_mean",
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(clip_low, clip_high, scale_by_std, reduction, entropy_coef)
        require_between("trrd_alpha", trrd_alpha, 0.0, 1.0, "1 is GRPO, 0 anchors at the teacher.")
        if offset_clamp is not None:
            require_between("offset_clamp", offset_clamp, 0.0, float("inf"), "Use null for none.")
        self.trrd_alpha = trrd_alpha
        self.offset_clamp = offset_clamp

    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the trust region ratio surrogate."""
        yield Term(
            "policy",
            trrd_surrogate(
                scores.logprobs,
                known(batch.old_logprobs, "old_logprobs"),
                known(batch.teacher_logprobs, "teacher_logprobs"),
                known(batch.advantages, "advantages"),
                self.trrd_alpha,
                self.clip_low,
                self.clip_high,
                self.offset_clamp,
            ),
        )

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the log of TRRD's ratio."""
        old = known(batch.old_logprobs, "old_logprobs")
        teacher = known(batch.teacher_logprobs, "teacher_logprobs")
        return trrd_log_ratio(logprobs, old, teacher, self.trrd_alpha, self.offset_clamp)

    def imitated(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the tokens with an advantage that the teacher's fence leaves alive."""
        ratio = self.log_ratio(batch, logprobs).exp()
        advantages = known(batch.advantages, "advantages")
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        alive = ((advantages > 0) & (ratio < 1 + self.clip_high)) | (
            (advantages < 0) & (ratio > 1 - self.clip_low)
        )
        anchored = self.trrd_alpha < 1 and self.offset_clamp != 0
        return alive & batch.loss_mask if anchored else alive & False
