"""Detached weights of tokens and completions in a distillation loss: pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def capped_ratio(logprobs: Tensor, old_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Return ``sg(min(pi / pi_old, cap))``, the weight of a token in SDPO (arXiv 2601.20802).

    Args:
        logprobs: ``[B, T]`` the current student's.
        old_logprobs: ``[B, T]`` the student's at rollout time.
        cap: largest weight.

    Returns:
        ``[B, T]`` weights without gradient; 1 in the first update of a rollout.

    >>> capped_ratio(torch.tensor([[0.0, -2.0]]), torch.tensor([[-2.0, -2.0]]))
    tensor([[2., 1.]])
    """
    return (logprobs - old_logprobs).detach().clamp(max=math.log(cap)).exp()


def gate(gap: Tensor, sharpness: float = 5.0) -> Tensor:
    """Return ``sg(sigmoid(sharpness gap))``, the weight of a token in SDAR (arXiv 2605.15155).

    Args:
        gap: ``[B, T]`` log pi_T - log pi, in nats.
        sharpness: factor on the gap; 0 gives every token one half.

    Returns:
        ``[B, T]`` weights in (0, 1), without gradient.

    >>> gate(torch.tensor([[0.0, 30.0]]))
    tensor([[0.5000, 1.0000]])
    """
    return (sharpness * gap.detach()).sigmoid()


def confidence(entropy: Tensor, sharpness: float = 1.0) -> Tensor:
    """Return ``e^(-sharpness H)``: a token's weight in SRPO before it is normalised (2604.02288).

    SRPO divides by the mean over the distilled tokens of the optimizer step, so adding a constant
    to every entropy changes nothing.

    Args:
        entropy: ``[B, T]`` nats, the teacher's.
        sharpness: factor on the entropy; 0 gives every token the same weight.

    Returns:
        ``[B, T]`` weights in [0, 1].
    """
    return (-sharpness * entropy.detach()).exp()


def shares(scores: Tensor, members: Tensor) -> Tensor:
    """Return the softmax over each row's members, and 0 for the others.

    SCOPE (arXiv 2604.10688, Eq. 4 and 5) weights the correct completions of a prompt this way, and
    separately the wrong ones.

    Args:
        scores: ``[P, G]``, finite for members.
        members: ``[P, G]`` bool.

    Returns:
        ``[P, G]``; each row sums to 1, or to 0 if it has no members.

    >>> shares(torch.tensor([[0.0, 9.0, 0.0]]), torch.tensor([[True, False, True]]))
    tensor([[0.5000, 0.0000, 0.5000]])
    """
    lowest = torch.finfo(scores.dtype).min
    return torch.where(members, scores.masked_fill(~members, lowest).softmax(1), 0.0)
