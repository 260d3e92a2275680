"""Corrections for a sampling engine whose log-probabilities differ from the trainer's.

Give these functions the trainer's log-probabilities at rollout time, never the current ones: a
correction with the current ones would be a second, unclipped policy ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Return truncated importance weights ``min(pi_old / mu, cap)``, per token.

    Args:
        old_logprobs: ``[B, T]`` the student's at rollout time, computed by the trainer.
        rollout_logprobs: ``[B, T]`` of the same tokens, as the engine reported them.
        cap: largest weight.

    Returns:
        ``[B, T]`` weights without gradient.
    """
    return (old_logprobs - rollout_logprobs).detach().clamp(max=math.log(cap)).exp()


def importance_mask(
    old_logprobs: Tensor, rollout_logprobs: Tensor, low: float = 0.5, high: float = 2.0
) -> Tensor:
    """Return the tokens with a ratio ``pi_old / mu`` in ``[low, high]``.

    Args:
        old_logprobs: ``[B, T]`` the student's at rollout time, computed by the trainer.
        rollout_logprobs: ``[B, T]`` of the same tokens, as the engine reported them.
        low: smallest ratio kept.
        high: largest ratio kept.

    Returns:
        ``[B, T]`` bool: True for the tokens to keep.
    """
    log_ratio = (old_logprobs - rollout_logprobs).detach()
    return (log_ratio >= math.log(low)) & (log_ratio <= math.log(high))


def sequence_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over each completion, repeated at each of its tokens.

    The sum of a completion's token log-ratios is the log-ratio of the whole completion. To weight
    whole completions, pass this sum to the functions above as ``old_logprobs``, and 0 as
    ``rollout_logprobs``.

    Args:
        values: ``[B, T]`` one value per token.
        mask: ``[B, T]`` bool: True on the completion's tokens.

    Returns:
        ``[B, T]``, equal along T.

    >>> sequence_sum(torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-3., -3., -3.]])
    """
    return torch.where(mask, values, 0.0).sum(1, keepdim=True).expand_as(values)
