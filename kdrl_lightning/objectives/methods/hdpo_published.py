"""HDPO as published: GRPO, plus imitation of correct answers to prompts that the student fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.losses import TokenScores, wrong_groups
from kdrl_lightning.objectives.advantages import Advantage
from kdrl_lightning.objectives.base import Term, known
from kdrl_lightning.objectives.methods.eopd import TeacherTopK
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio
from kdrl_lightning.objectives.selections import Selection
from kdrl_lightning.rollout_batch import STUDENT, TEACHER, RolloutBatch


class SolvedByTeacher(Selection):
    """Selects the teacher's correct completions for prompts that the student fails every time.

    In HDPO (arXiv 2603.23871) the teacher reads a privileged prompt; only these completions stay.
    """

    reads_old_scores = False

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B]`` bool."""
        accepted = rollout.correct & (rollout.source == STUDENT)
        solved = rollout.correct & (rollout.source == TEACHER)
        return solved & wrong_groups(accepted, rollout.group_ids)


class OwnGroup(Advantage):
    """Gives the student's completions their advantage within the group, and the teacher's 0.

    Args:
        scale_by_std: divide by the standard deviation of the rewards of the student's completions.
    """

    def prepare(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B]`` advantages; the teacher's completions get 0 and count in no mean."""
        rows = (rollout.source == STUDENT).nonzero().squeeze(1)
        out = torch.zeros_like(rollout.rewards)
        out[rows] = super().prepare(rollout.select(rows))
        return out


class PublishedHDPO(PolicyObjective):
    """HDPO as published: GRPO, plus imitation of correct answers to failed prompts (2603.23871).

    ``L_GRPO + teacher_kl_coef / N sum JSD(T, S)`` over the N tokens of the step's kept completions.
    The teacher samples (``data.teacher_completions``) only for prompts that the student fails in
    all its completions, and its correct completions are kept. T is the teacher on its ``top_k``
    most likely tokens, renormalised, S the student's whole distribution. Kept completions enter no
    advantage and no denominator of GRPO. ``reduction`` is always ``token_mean``.

    Args:
        teacher_kl_coef: weight of the divergence, at least 0. Published: 0.1 and 0.01.
        top_k: see ``TeacherTopK``. Published: 64.
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``.
        scale_by_std: see ``Advantage``.
        policy: further settings of ``PolicyObjective``.
    """

    takes_teacher_completions = True
    asks_for_failed = True

    def __init__(
        self,
        teacher_kl_coef: float = 0.1,
        top_k: int = 64,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        scale_by_std: bool = True,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high),
            advantage=OwnGroup(scale_by_std),
            distill=TeacherTopK(teacher_kl_coef, 0.5, top_k, per_imitated_token=True),
            selection=(SolvedByTeacher(),),
            reduction="token_mean",
            **policy,
        )

    def prepare(self, rollout: RolloutBatch) -> RolloutBatch:
        """Return the rollout with the teacher's other completions left out of the loss."""
        rollout = super().prepare(rollout)
        kept = known(rollout.imitation_mask, "imitation_mask") | rollout.student_mask
        return rollout.replace(loss_mask=rollout.loss_mask & kept)

    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield GRPO's terms, divided by the student's tokens alone, and the divergence."""
        totals = known(batch.totals, "totals")
        grpo_tokens = max(totals.num_loss_tokens - totals.num_imitated_tokens, 1.0)
        for term in super().terms(batch, scores):
            if term.per_masked_token:
                yield term
            else:
                share = totals.num_loss_tokens / grpo_tokens
                yield replace(term, per_token=term.per_token * share, mask=batch.student_mask)
