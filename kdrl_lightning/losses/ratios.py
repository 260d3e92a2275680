"""Policy surrogates: token, sequence, CISPO, trust region (TRRD) and teacher-token ratios."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
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
        dual_clip: upper bound on the ratio where A < 0, above 1 (arXiv 1912.09729); None for none.

    Returns:
        ``[B, T]`` loss; at r = 1 its gradient is ``-A`` times that of ``logprobs``.

    >>> clipped_surrogate(torch.tensor([[0.5]]), torch.tensor([[0.0]]), torch.tensor([1.0]))
    tensor([[-1.2000]])
    """
    log_ratio = logprobs - old_logprobs.detach()
    return _clipped(log_ratio, advantages, clip_low, clip_high, dual_clip)


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log of GSPO's ratio: the mean of log rho over a completion's tokens, on each of them.

    GSPO (arXiv 2507.18071): ``s = (pi(o|q) / pi_old(o|q))^(1/|o|)``.

    Args:
        logprobs: ``[B, T]`` student now, with gradient.
        old_logprobs: ``[B, T]`` student at rollout time; detached here.
        mask: ``[B, T]`` bool, the completion's tokens.

    Returns:
        ``[B, T]``, one value per row; 0 in a row without tokens.
    """
    log_rho = (logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0)
    mean = log_rho.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(logprobs)


def sequence_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """GSPO's surrogate: one clipped ratio for a whole completion.

    GSPO (arXiv 2507.18071), in its token form: the ratio's value is the completion's, its gradient
    each token's own, ``sg(s) pi / sg(pi)``. With one advantage per completion it is the paper's
    loss under ``sequence_mean``; advantages per token stay with their token.

    Args:
        logprobs: ``[B, T]`` student now, with gradient.
        old_logprobs: ``[B, T]`` student at rollout time; detached here.
        advantages: ``[B]`` or ``[B, T]``; detached here.
        mask: ``[B, T]`` bool, the completion's tokens.
        clip_low: the ratio's lower bound is ``1 - clip_low``.
        clip_high: the ratio's upper bound is ``1 + clip_high``.

    Returns:
        ``[B, T]`` loss.
    """
    value = sequence_log_ratio(logprobs, old_logprobs, mask).detach()
    return _clipped(value + logprobs - logprobs.detach(), advantages, clip_low, clip_high)


def cispo_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_high: float = 0.28
) -> Tensor:
    """CISPO: a policy gradient whose importance weight is clipped, never its gradient.

    MiniMax-M1 (arXiv 2506.13585): ``-sg(min(rho, 1 + clip_high)) A log pi``.

    Args:
        logprobs: ``[B, T]`` student now, with gradient.
        old_logprobs: ``[B, T]`` student at rollout time; detached here.
        advantages: ``[B]`` or ``[B, T]``; detached here.
        clip_high: the weight's upper bound is ``1 + clip_high``.

    Returns:
        ``[B, T]`` loss; no token's gradient is dead.
    """
    log_ratio = (logprobs - old_logprobs).detach()
    weight = log_ratio.clamp(max=math.log1p(clip_high)).exp()
    return -weight * _per_token(advantages, logprobs) * logprobs


def luffy_surrogate(logprobs: Tensor, advantages: Tensor, gamma: float = 0.1) -> Tensor:
    """LUFFY's shaped, unclipped surrogate for the tokens of a teacher's completion.

    LUFFY (arXiv 2504.14945): ``-f(pi) A`` with ``f(x) = x / (x + gamma)``, which keeps the gradient
    of tokens that the student finds improbable.

    Args:
        logprobs: ``[B, T]`` student now, with gradient.
        advantages: ``[B]`` or ``[B, T]``; detached here.
        gamma: where f reaches one half, above 0.

    Returns:
        ``[B, T]`` loss.

    >>> luffy_surrogate(torch.tensor([[0.1]]).log(), torch.tensor([1.0]))
    tensor([[-0.5000]])
    """
    # x / (x + gamma) as a sigmoid of log x: no division, and no underflow of x.
    return -_per_token(advantages, logprobs) * (logprobs - math.log(gamma)).sigmoid()


def trrd_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    trrd_alpha: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    offset_clamp: float | None = 1.0,
    dual_clip: float | None = None,
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
        dual_clip: upper bound on the ratio where A < 0, above 1; None for none.

    Returns:
        ``[B, T]`` loss; exactly without gradient where A = 0.
    """
    log_ratio = trrd_log_ratio(logprobs, old_logprobs, teacher_logprobs, trrd_alpha, offset_clamp)
    return _clipped(log_ratio, advantages, clip_low, clip_high, dual_clip)


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


def _clipped(
    log_ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """``-min(r A, clip(r) A)``: only the bound on the side of A's sign ever acts.

    It is applied before the exponential, so that a fenced ratio cannot overflow into 0 * inf.
    """
    advantages = _per_token(advantages, log_ratio)
    high = log_ratio.new_tensor(clip_high).log1p()
    low = log_ratio.new_tensor(-clip_low).log1p()
    fence = torch.where(advantages < 0, low, high)
    dead = torch.where(advantages < 0, log_ratio < fence, log_ratio > fence)
    if dual_clip is not None:
        far = (advantages < 0) & (log_ratio > math.log(dual_clip))
        fence, dead = torch.where(far, math.log(dual_clip), fence), dead | far
    return -advantages * torch.where(dead, fence, log_ratio).exp()


def _per_token(advantages: Tensor, like: Tensor) -> Tensor:
    """Detach, and let ``[B]`` stand in front of ``[B, T]``."""
    advantages = advantages.detach()
    return advantages.unsqueeze(-1) if advantages.dim() == like.dim() - 1 else advantages
