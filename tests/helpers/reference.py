"""Slow, plain references for the losses, one token at a time, and the hypothesis profile.

Nothing here calls the library's maths: formulas are those of the papers, on Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

settings.register_profile("laws", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("laws")

RTOL = 1e-10


def f64(values: Any) -> Tensor:
    """Return numbers, nested lists or a tensor as a float64 tensor without graph."""
    return torch.as_tensor(values, dtype=torch.float64).detach()


def close(actual: Any, expected: Any, tol: float = RTOL) -> None:
    """Assert equality in float64, relative and absolute ``tol``; shapes must agree."""
    torch.testing.assert_close(f64(actual), f64(expected), rtol=tol, atol=tol)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Return standard normal float64 numbers from a separate generator."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def one(value: float) -> Tensor:
    """Return a ``[1, 1]`` tensor."""
    return torch.tensor([[value]], dtype=torch.float64)


def graded(function: Any, logprobs: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the per-token loss and its derivative by ``logprobs``."""
    leaf = logprobs.clone().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Normalise a list of logits."""
    top = max(logits)
    norm = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - norm for x in logits]


def kl(log_p: Sequence[float], log_q: Sequence[float]) -> float:
    """Return KL(p || q) by its definition."""
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def reverse_kl_gradient(log_p: Sequence[float], log_q: Sequence[float]) -> list[float]:
    """Gradient of KL(p || q) by p's logits: ``p_j (log p_j - log q_j - KL(p || q))``."""
    mean = kl(log_p, log_q)
    return [math.exp(a) * (a - b - mean) for a, b in zip(log_p, log_q, strict=True)]


def forward_kl_gradient(log_p: Sequence[float], log_q: Sequence[float]) -> list[float]:
    """Gradient of KL(q || p) by p's logits: ``p_j - q_j``."""
    return [math.exp(a) - math.exp(b) for a, b in zip(log_p, log_q, strict=True)]


def surrogate(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """Return the loss of a token and its derivative by log pi: PPO's four cases, spelled out."""
    if advantage > 0 and ratio > 1 + high:
        return -(1 + high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


def trrd_ratio(
    lp: float, old: float, teacher: float, alpha: float, clamp: float | None = None
) -> float:
    """``(pi/pi_old)^alpha (pi/pi_T)^(1-alpha)``; a clamp moves the teacher towards the old."""
    if clamp is not None:
        teacher = old - min(max(old - teacher, -clamp), clamp)
    pi, pi_old, pi_teacher = math.exp(lp), math.exp(old), math.exp(teacher)
    return (pi / pi_old) ** alpha * (pi / pi_teacher) ** (1 - alpha)


def published_trrd(
    lp: float, old: float, teacher: float, alpha: float, clamp: float
) -> tuple[float, float]:
    """Return TRRD's ratio with RLAD's App. B, and the derivative of its logarithm by log pi.

    log(pi / pi_T) is clamped inside the graph: where the clamp acts, the derivative is alpha.
    """
    to_teacher = lp - teacher
    if abs(to_teacher) > clamp:
        bound = math.copysign(clamp, to_teacher)
        return math.exp(alpha * (lp - old) + (1 - alpha) * bound), alpha
    return math.exp(alpha * (lp - old) + (1 - alpha) * to_teacher), 1.0


def token_weights(
    lengths: Sequence[int], groups: Sequence[int], reduction: str, max_tokens: int
) -> list[float]:
    """Return the weight of a token of each completion in the step's loss.

    Args:
        lengths: loss tokens of each completion of the whole step.
        groups: group of each completion.
        reduction: name of the reduction.
        max_tokens: Dr.GRPO's constant.
    """
    used = [n for n in lengths if n]
    prompts = {g for g, n in zip(groups, lengths, strict=True) if n}
    out = []
    for group, n in zip(groups, lengths, strict=True):
        if n == 0:
            out.append(0.0)
        elif reduction == "token_mean":
            out.append(1 / sum(lengths))
        elif reduction == "sequence_mean":
            out.append(1 / (len(used) * n))
        elif reduction == "constant_length":
            out.append(1 / (len(used) * max_tokens))
        else:
            of_group = sum(m for g, m in zip(groups, lengths, strict=True) if g == group)
            out.append(1 / (len(prompts) * of_group))
    return out
