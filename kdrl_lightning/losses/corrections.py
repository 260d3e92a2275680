"""Correction for a sampling engine that disagrees with the trainer about log-probabilities.

All take the trainer's log-probabilities at rollout time, never the current ones: a correction by
the current ones would be a second, unclipped policy ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Truncated importance weights ``min(pi_old / mu, cap)``, per token.

    Args:
        old_logprobs: ``[B, T]`` student at rollout time, by the trainer.
        rollout_logprobs: ``[B, T]`` of the same tokens, as the engine reported them.
        cap: largest weight.

    Returns:
        ``[B, T]`` weights without gradient.
    """
    return (old_logprobs - rollout_logprobs).detach().clamp(max=math.log(cap)).exp()


def importance_mask(
    old_logprobs: Tensor, rollout_logprobs: Tensor, low: float = 0.5, high: float = 2.0
) -> Tensor:
    """Keep the tokens whose ratio ``pi_old / mu`` lies in ``[low, high]``.

    Args:
        old_logprobs: ``[B, T]`` student at rollout time, by the trainer.
        rollout_logprobs: ``[B, T]`` of the same tokens, as the engine reported them.
        low: smallest ratio kept.
        high: largest ratio kept.

    Returns:
        ``[B, T]`` bool.
    """
    log_ratio = (old_logprobs - rollout_logprobs).detach()
    return (log_ratio >= math.log(low)) & (log_ratio <= math.log(high))


def sequence_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over each completion, at each of its tokens.

    The log of a whole completion's ratio from those of its tokens; with it in place of
    ``old_logprobs``, and 0 for ``rollout_logprobs``, the functions above weight whole completions.

    Args:
        values: ``[B, T]``.
        mask: ``[B, T]`` bool, the completion's tokens.

    Returns:
        ``[B, T]``, equal along T.

    >>> sequence_sum(torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-3., -3., -3.]])
    """
    return torch.where(mask, values, 0.0).sum(1, keepdim=True).expand_as(values)
