"""Supervised fine-tuning: cross-entropy on given completions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kdrl_lightning.losses import TokenScores
from kdrl_lightning.objectives.base import Objective, Reduction, Term
from kdrl_lightning.rollout_batch import RolloutBatch


class SFT(Objective):
    """Cross-entropy of given completions: the teacher's (``group_size: 0``), or a dataset's.

    It is a baseline in KDRL's paper (arXiv 2506.02208, section 2.2).

    Args:
        only_correct: train only on completions that the verifier accepts: rejection-sampled SFT.
        reduction: how per-token values become one number, see ``losses/reduction.py``.
        entropy_coef: weight of the entropy bonus.
    """

    takes_teacher_completions = True

    def __init__(
        self,
        only_correct: bool = False,
        reduction: Reduction = "token_mean",
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(reduction, entropy_coef)
        self.only_correct = only_correct

    def prepare(self, rollout: RolloutBatch) -> RolloutBatch:
        """Return the rollout; with ``only_correct``, wrong completions are left out of the loss."""
        if self.only_correct and len(rollout):
            kept = rollout.loss_mask & rollout.correct[:, None]
            tokens = kept.new_zeros(int(rollout.group_ids.max()) + 1, dtype=torch.float32)
            tokens.index_add_(0, rollout.group_ids, kept.sum(1).float())
            rollout = rollout.replace(loss_mask=kept, group_tokens=tokens[rollout.group_ids])
        return super().prepare(rollout)

    def reads_old_scores(self, rollout: RolloutBatch) -> bool:
        """Return False: ``prepare`` reads only the verdicts."""
        return False

    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the negative log-likelihood of each token."""
        yield Term("nll", -scores.logprobs)
