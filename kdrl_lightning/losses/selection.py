"""Where to imitate: masks over tokens, from what is known once a rollout is scored."""

from __future__ import annotations

import torch
from torch import Tensor


def wrong_completions(correct: Tensor) -> Tensor:
    """Completions that the verifier rejects: KDRL's response-level mask (arXiv 2506.02208).

    Args:
        correct: ``[B]`` bool.

    Returns:
        ``[B]`` bool.
    """
    return ~correct


def wrong_groups(correct: Tensor, group_ids: Tensor) -> Tensor:
    """Completions of groups without a correct one: KDRL's group-level mask (arXiv 2506.02208).

    Args:
        correct: ``[B]`` bool.
        group_ids: ``[B]`` int64 from 0 on.

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
    """Tokens where student and teacher are close: ``|log pi_T - log pi_old| <= threshold``.

    Args:
        old_logprobs: ``[B, T]``.
        teacher_logprobs: ``[B, T]``.
        mask: ``[B, T]`` bool, the completion's tokens.
        threshold: largest gap, nats.
        per_completion: judge a whole completion by its mean gap.

    Returns:
        ``[B, T]`` bool; False outside ``mask``.
    """
    gap = (teacher_logprobs - old_logprobs).abs().masked_fill(~mask, 0.0)
    if per_completion:
        gap = (gap.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(gap)
    return mask & (gap <= threshold)


def beneficial(advantages: Tensor, threshold: float) -> Tensor:
    """Where the advantage reaches ``threshold``; shape of ``advantages``."""
    return advantages >= threshold


def certain(old_entropy: Tensor, threshold: float) -> Tensor:
    """Where the student's entropy is at most ``threshold`` nats: no free exploration needed."""
    return old_entropy <= threshold
