"""GRPO: a clipped policy gradient with group-relative advantages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from kdrl_lightning.advantages import group_relative
from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.losses import clipped_surrogate
from kdrl_lightning.objectives.base import Objective, Reduction, Term, TokenScores, known
from kdrl_lightning.rollout_batch import RolloutBatch


class GRPO(Objective):
    """Group Relative Policy Optimization (arXiv 2402.03300), without a reference KL.

    Args:
        clip_low: the ratio is clipped below at ``1 - clip_low``, in [0, 1].
        clip_high: the ratio is clipped above at ``1 + clip_high``, at least 0.
        scale_by_std: divide advantages by the group's standard deviation.
        reduction: the paper takes ``sequence_mean``; the default is DAPO's global token mean.
        entropy_coef: weight of the entropy bonus.
    """

    needs_groups: ClassVar[bool] = True

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        scale_by_std: bool = True,
        reduction: Reduction = "token_mean",
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(reduction, entropy_coef)
        require_between("clip_low", clip_low, 0.0, 1.0)
        require_between("clip_high", clip_high, 0.0, float("inf"))
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.scale_by_std = scale_by_std

    def prepare(self, rollout: RolloutBatch) -> RolloutBatch:
        """Add advantages; groups must have one size."""
        order = rollout.group_ids.argsort(stable=True)
        sizes = rollout.group_ids.unique(return_counts=True)[1]
        if sizes.numel() and bool((sizes != sizes[0]).any()):
            raise ConfigurationError(f"groups must have one size: got {sizes.tolist()}.")
        advantages = rollout.rewards.new_zeros(len(rollout))
        if len(rollout):
            rewards = rollout.rewards[order].view(sizes.numel(), -1)
            advantages[order] = group_relative(rewards, self.scale_by_std).flatten()
        return super().prepare(rollout).replace(advantages=advantages)

    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the clipped surrogate."""
        yield Term(
            "policy",
            clipped_surrogate(
                scores.logprobs,
                known(batch.old_logprobs, "old_logprobs"),
                known(batch.advantages, "advantages"),
                self.clip_low,
                self.clip_high,
            ),
        )
