"""Masks that select the tokens on which the student imitates the teacher."""

from __future__ import annotations

import torch
from torch import Tensor


def wrong_completions(correct: Tensor) -> Tensor:
    """Return the completions that the verifier rejects: KDRL's response mask (arXiv 2506.02208).

    Args:
        correct: ``[B]`` bool: the verifier accepts the completion.

    Returns:
        ``[B]`` bool.
    """
    return ~correct


def wrong_groups(correct: Tensor, group_ids: Tensor) -> Tensor:
    """Return the completions of groups without a correct one: KDRL's group mask (arXiv 2506.02208).

    HDPO (arXiv 2603.23871) uses the same mask.

    Args:
        correct: ``[B]`` bool: the verifier accepts the completion.
        group_ids: ``[B]`` int64, group numbers from 0.

    Returns:
        ``[B]`` bool.

    >>> wrong_groups(torch.tensor([True, False, False]), torch.tensor([0, 0, 1]))
    tensor([False, False,  True])
    """
    groups = int(group_ids.max()) + 1 if len(group_ids) else 0
    solved = torch.zeros(groups, dtype=torch.int64, device=correct.device)
    solved.index_add_(0, group_ids, correct.long())
    return (solved == 0)[group_ids]


def aligned(
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    threshold: float,
    per_completion: bool = False,
) -> Tensor:
    """Return the tokens with a small gap: ``|log pi_T - log pi_old| <= threshold``.

    Args:
        old_logprobs: ``[B, T]`` the student's at rollout time.
        teacher_logprobs: ``[B, T]`` the teacher's.
        mask: ``[B, T]`` bool: True on the completion's tokens.
        threshold: largest gap, in nats.
        per_completion: compare each completion's mean absolute gap with the threshold.

    Returns:
        ``[B, T]`` bool; False outside ``mask``.
    """
    gap = (teacher_logprobs - old_logprobs).abs().masked_fill(~mask, 0.0)
    if per_completion:
        gap = (gap.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(gap)
    return mask & (gap <= threshold)


def beneficial(advantages: Tensor, threshold: float) -> Tensor:
    """Return a mask shaped like ``advantages``: True for values of at least ``threshold``."""
    return advantages >= threshold


def certain(old_entropy: Tensor, threshold: float) -> Tensor:
    """Return a mask shaped like ``old_entropy``: True for values of at most ``threshold``.

    Both are in nats, and the entropy is the student's. On the other tokens the student may explore.
    """
    return old_entropy <= threshold
