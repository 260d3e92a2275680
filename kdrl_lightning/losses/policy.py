"""Policy surrogates: GRPO's clipped ratio and RLAD's trust region ratio (TRRD)."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """PPO's clipped surrogate as a loss, per token.

    PPO (arXiv 1707.06347, Eq. 7), as used by GRPO (2402.03300); unequal bounds: DAPO (2503.14476).

    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = exp(logprobs - old_logprobs)``.

    Args:
        logprobs: ``[B, T]`` student now, with gradient.
        old_logprobs: ``[B, T]`` student at rollout time; detached here.
        advantages: ``[B]`` or ``[B, T]``; detached here.
        clip_low: the ratio's lower bound is ``1 - clip_low``.
        clip_high: the ratio's upper bound is ``1 + clip_high``.

    Returns:
        ``[B, T]`` loss; at r = 1 its gradient is ``-A`` times that of ``logprobs``.

    >>> clipped_surrogate(torch.tensor([[0.5]]), torch.tensor([[0.0]]), torch.tensor([1.0]))
    tensor([[-1.2000]])
    """
    return _clipped(logprobs - old_logprobs.detach(), advantages, clip_low, clip_high)


def trrd_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    trrd_alpha: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    offset_clamp: float | None = 1.0,
) -> Tensor:
    """Trust Region Ratio Distillation: a clipped surrogate anchored at old student and teacher.

    RLAD (arXiv 2602.22495, Eq. 3 and 4), alpha by the formula: 1 is GRPO, bit for bit.

    ``r = (pi/pi_old)^alpha (pi/pi_T)^(1-alpha)``, loss ``-min(r A, clip(r) A)``. Equal to
    ``w min(rho A, clip(rho, (1-clip_low)/w, (1+clip_high)/w) A)`` with the constant
    ``w = (pi_old/pi_T)^(1-alpha)``: the teacher scales a token's gradient and moves its fence. At
    ``pi = pi_old`` a rewarded token is dead where ``pi_old/pi_T > (1+clip_high)^(1/(1-alpha))``, a
    punished one where it is below ``(1-clip_low)^(1/(1-alpha))``.

    Args:
        logprobs: ``[B, T]`` student now, with gradient.
        old_logprobs: ``[B, T]`` student at rollout time; detached here.
        teacher_logprobs: ``[B, T]`` frozen teacher; detached here.
        advantages: ``[B]`` or ``[B, T]``; detached here.
        trrd_alpha: weight of the old student's anchor, in [0, 1].
        clip_low: the ratio's lower bound is ``1 - clip_low``.
        clip_high: the ratio's upper bound is ``1 + clip_high``.
        offset_clamp: bound on ``|log pi_old - log pi_T|`` [our choice; None: unbounded].

    Returns:
        ``[B, T]`` loss; exactly without gradient where A = 0.
    """
    log_ratio = trrd_log_ratio(logprobs, old_logprobs, teacher_logprobs, trrd_alpha, offset_clamp)
    return _clipped(log_ratio, advantages, clip_low, clip_high)


def trrd_log_ratio(
    logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    trrd_alpha: float = 0.5,
    offset_clamp: float | None = 1.0,
) -> Tensor:
    """Log of TRRD's ratio: ``log rho + (1 - alpha) o`` with o the clamped, detached offset.

    RLAD (arXiv 2602.22495, Eq. 3) with ``alpha (lp - lp_old) + (1 - alpha)(lp - lp_T)`` sorted by
    what carries gradient. The clamp touches ``o = lp_old - lp_T`` only: clamping ``lp - lp_T``
    inside the graph would silently cut a token's weight to alpha.

    Args:
        logprobs: ``[B, T]`` student now, with gradient.
        old_logprobs: ``[B, T]`` student at rollout time; detached here.
        teacher_logprobs: ``[B, T]`` frozen teacher; detached here.
        trrd_alpha: weight of the old student's anchor, in [0, 1].
        offset_clamp: bound on ``|o|``; None for none.

    Returns:
        ``[B, T]``.
    """
    log_rho = logprobs - old_logprobs.detach()
    if trrd_alpha == 1.0:
        return log_rho
    offset = (old_logprobs - teacher_logprobs).detach()
    if offset_clamp is not None:
        offset = offset.clamp(-offset_clamp, offset_clamp)
    return log_rho + (1.0 - trrd_alpha) * offset


def _clipped(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """``-min(r A, clip(r) A)``: only the bound on the side of A's sign ever acts.

    It is applied before the exponential, so that a fenced ratio cannot overflow into 0 * inf.
    """
    advantages = advantages.detach()
    if advantages.dim() == log_ratio.dim() - 1:
        advantages = advantages.unsqueeze(-1)
    high = log_ratio.new_tensor(clip_high).log1p()
    low = log_ratio.new_tensor(-clip_low).log1p()
    fence = torch.where(advantages < 0, low, high)
    dead = torch.where(advantages < 0, log_ratio < fence, log_ratio > fence)
    return -advantages * torch.where(dead, fence, log_ratio).exp()
