"""Advantage rules: they turn rewards, verdicts and the teacher's gap into advantages per token.

A is the group-relative advantage of a completion, d the teacher's gap ``log pi_T - log pi`` on a
token, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.losses.advantages import group_relative, reweighted, shaped
from kdrl_lightning.losses.teacher_chunks import chunk_share
from kdrl_lightning.objectives.base import Part, check_coefficient, known, teacher_logprobs
from kdrl_lightning.rollout_batch import RolloutBatch


class Advantage(Part):
    """Gives each token its completion's group-relative advantage A: GRPO (arXiv 2402.03300).

    Args:
        scale_by_std: divide by the group's standard deviation; Dr.GRPO (arXiv 2503.20783) leaves
            the division out.

    Attributes:
        needs_groups: the rule compares the completions of one prompt.
    """

    needs_groups: bool = True

    def __init__(self, scale_by_std: bool = True) -> None:
        self.scale_by_std = scale_by_std

    def prepare(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B]`` advantages, once per rollout."""
        return by_group(rollout, lambda r: group_relative(r, self.scale_by_std), rollout.rewards)

    def __call__(self, batch: RolloutBatch, gap: Tensor) -> Tensor:
        """Return the ``[B, T]`` advantage of each token.

        Args:
            batch: completions with the advantages of ``prepare``.
            gap: ``[B, T]`` d = log pi_T - log pi of the current forward pass, in nats, detached; 0
                on tokens that are not imitated.
        """
        advantages = known(batch.advantages, "advantages")
        return advantages if advantages.dim() == 2 else advantages[:, None].expand_as(gap)

    def same_scores(self, other: Advantage | None) -> bool:
        """Return whether ``prepare`` of the other rule gives the same advantages."""
        plain = type(self).prepare is Advantage.prepare
        same = other is not None and type(other).prepare is Advantage.prepare
        return plain and same and other is not None and self.scale_by_std == other.scale_by_std

    def changed(self, batch: RolloutBatch, advantages: Tensor) -> Tensor:
        """Return ``[B, T]`` bool: the teacher changed the token's advantage."""
        return advantages != self(batch, torch.zeros_like(advantages))


class GapAdvantage(Advantage):
    """Gives ``d = log pi_T - log pi``: on-policy distillation (arXiv 2506.02208, section 2.2)."""

    needs_teacher = True
    needs_groups = False

    def __init__(self) -> None:
        super().__init__(scale_by_std=False)

    def prepare(self, rollout: RolloutBatch) -> Tensor:
        """Return zeros: rewards are measured and do not enter the loss."""
        return torch.zeros_like(rollout.rewards)

    def __call__(self, batch: RolloutBatch, gap: Tensor) -> Tensor:
        """Return d."""
        return gap


class SumAdvantage(Advantage):
    """Gives ``reward_coef A + teacher_kl_coef d``: KDRL as a policy gradient (arXiv 2506.02208).

    ``d = log pi_T - log pi``, without gradient. This is KDRL-mask with ``WrongCompletions``, HDPO
    (2603.23871) with ``WrongGroups``, and OPD-then-RL (2609.04108) with schedules on both
    coefficients.

    Args:
        teacher_kl_coef: weight of d, at least 0.
        reward_coef: weight of A, at least 0.
        scale_by_std: divide A by the group's standard deviation.
    """

    needs_teacher = True

    def __init__(
        self, teacher_kl_coef: float = 2e-3, reward_coef: float = 1.0, scale_by_std: bool = True
    ) -> None:
        super().__init__(scale_by_std)
        self.teacher_kl_coef = check_coefficient("teacher_kl_coef", teacher_kl_coef)
        self.reward_coef = check_coefficient("reward_coef", reward_coef)

    def __call__(self, batch: RolloutBatch, gap: Tensor) -> Tensor:
        """Return the weighted sum of A and d."""
        return self.reward_coef * super().__call__(batch, gap) + self.teacher_kl_coef * gap


class VerdictAdvantage(Advantage):
    """Gives A to correct completions and the gap d to wrong ones: SRPO (arXiv 2604.02288).

    ``d = log pi_T - log pi``, without gradient. A wrong completion without a context (see
    ``PromptedTeacher``) keeps A, as in the paper. SRPO was published with a self-teacher; this
    form, in which d is an advantage, comes from arXiv 2609.04108.

    Args:
        scale_by_std: divide A by the group's standard deviation.
    """

    needs_teacher = True

    def __call__(self, batch: RolloutBatch, gap: Tensor) -> Tensor:
        """Return A for correct completions and those without a context, else d."""
        without = False if batch.has_context is None else ~batch.has_context
        rewarded = batch.correct | without
        return torch.where(rewarded[:, None], super().__call__(batch, gap), gap)


class ReweightedAdvantage(Advantage):
    """Gives A scaled by the teacher: RLSD (arXiv 2604.03128).

    ``A ((1 - mix) + mix clip(e^(sign(A) d), 1 - width, 1 + width))``, with
    ``d = log pi_T - log pi``. RLSD was published with a self-teacher; arXiv 2609.04108 uses an
    external one.

    Args:
        mix: lambda, in [0, 1]; 0 is GRPO.
        width: eps_w, in [0, 1].
        scale_by_std: divide A by the group's standard deviation.
    """

    needs_teacher = True

    def __init__(self, mix: float = 0.5, width: float = 0.2, scale_by_std: bool = True) -> None:
        super().__init__(scale_by_std)
        require_between("mix", mix, 0.0, 1.0, "0 is GRPO.")
        require_between("width", width, 0.0, 1.0)
        self.mix = mix
        self.width = width

    def __call__(self, batch: RolloutBatch, gap: Tensor) -> Tensor:
        """Return A, scaled by the teacher's gap."""
        return reweighted(super().__call__(batch, gap), gap, self.mix, self.width)


class ShapedAdvantage(Advantage):
    """Gives the group-relative advantage of rewards plus the teacher's mean gap: reward shaping.

    KDRL (arXiv 2506.02208) compares reward shaping with its joint loss; this form is our choice.

    Args:
        teacher_kl_coef: weight of the mean gap in the reward, at least 0.
        scale_by_std: divide by the standard deviation of the unshaped rewards.
    """

    needs_teacher = True
    reads_old_scores = True

    def __init__(self, teacher_kl_coef: float = 2e-3, scale_by_std: bool = True) -> None:
        super().__init__(scale_by_std)
        self.teacher_kl_coef = check_coefficient("teacher_kl_coef", teacher_kl_coef)

    def prepare(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B]`` advantages of the shaped rewards, with d at the old log-probabilities."""
        old = known(rollout.old_logprobs, "old_logprobs")
        # The mean of d counts a chunk once, as the sum over a completion does.
        gap = chunk_share(teacher_logprobs(rollout, old) - old, rollout.chunk_places)
        mask = known(rollout.imitation_mask, "imitation_mask") & rollout.student_mask
        tokens = rollout.loss_mask.sum(1).clamp(min=1)
        mean = gap.masked_fill(~mask, 0.0).sum(1) / tokens

        def advantages(rewards: Tensor, means: Tensor, *known: Tensor) -> Tensor:
            has_gap = known[0] if known else None
            return shaped(rewards, means, self.teacher_kl_coef, self.scale_by_std, has_gap=has_gap)

        known_rows = [] if rollout.has_context is None else [rollout.has_context]
        means = mean.to(rollout.rewards.dtype)
        return by_group(rollout, advantages, rollout.rewards, means, *known_rows)

    def changed(self, batch: RolloutBatch, advantages: Tensor) -> Tensor:
        """Return True in groups with an imitated token, except on rows without a context.

        The gap of one completion changes the mean that the others are compared with.
        """
        used = known(batch.imitation_mask, "imitation_mask") & batch.student_mask
        # A selection by a mask would make the host wait for a GPU.
        same = batch.group_ids[:, None] == batch.group_ids
        rows = (same & used.any(1)).any(1) & (self.teacher_kl_coef > 0.0)
        if batch.has_context is not None:
            rows = rows & batch.has_context
        return rows[:, None].expand_as(batch.loss_mask)


def by_group(rollout: RolloutBatch, function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Apply a function of tables ``[P, G]``, one row per group, to columns ``[B]``; return ``[B]``.

    Args:
        rollout: completions with their ``group_ids``; the rows of a group may lie anywhere.
        function: gets one table per column, and returns a table.
        columns: ``[B]``, one value per completion.

    Raises:
        ConfigurationError: the groups differ in size.
    """
    order = rollout.group_ids.argsort(stable=True)
    sizes = rollout.group_ids.unique(return_counts=True)[1]
    if sizes.numel() and bool((sizes != sizes[0]).any()):
        raise ConfigurationError(
            f"`group_ids` must give groups of one size: got {sizes.tolist()}. Give each prompt "
            "the same number of completions."
        )
    out = torch.zeros_like(columns[0])
    if len(rollout):
        tables = [column[order].view(sizes.numel(), -1) for column in columns]
        out[order] = function(*tables).flatten()
    return out
