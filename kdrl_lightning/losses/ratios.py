"""Policy surrogates with token, sequence, CISPO, trust-region (TRRD) and teacher-token ratios."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """Return PPO's clipped surrogate as a loss, per token.

    PPO (arXiv 1707.06347, Eq. 7), as GRPO (2402.03300) uses it; DAPO (2503.14476) uses unequal
    bounds.

    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = exp(logprobs - old_logprobs)``.

    Args:
        logprobs: ``[B, T]`` the current student's, with gradient.
        old_logprobs: ``[B, T]`` the student's at rollout time; this function detaches them.
        advantages: ``[B]`` or ``[B, T]``; this function detaches them.
        clip_low: the ratio's lower bound is ``1 - clip_low``.
        clip_high: the ratio's upper bound is ``1 + clip_high``.
        dual_clip: upper bound on the ratio for A < 0, above 1 (arXiv 1912.09729); None: no bound.

    Returns:
        ``[B, T]`` loss; at r = 1 its gradient is ``-A`` times that of ``logprobs``.

    >>> clipped_surrogate(torch.tensor([[0.5]]), torch.tensor([[0.0]]), torch.tensor([1.0]))
    tensor([[-1.2000]])
    """
    log_ratio = logprobs - old_logprobs.detach()
    return _clipped(log_ratio, advantages, clip_low, clip_high, dual_clip)


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the log of GSPO's ratio: the mean of log rho over a completion, at each of its tokens.

    GSPO (arXiv 2507.18071): ``s = (pi(o|q) / pi_old(o|q))^(1/|o|)``.

    Args:
        logprobs: ``[B, T]`` the current student's, with gradient.
        old_logprobs: ``[B, T]`` the student's at rollout time; this function detaches them.
        mask: ``[B, T]`` bool: True on the completion's tokens.

    Returns:
        ``[B, T]``, equal along T; 0 in a row without tokens.
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
    """Return GSPO's surrogate, which clips one ratio for a whole completion.

    GSPO (arXiv 2507.18071) in its token form ``sg(s) pi / sg(pi)``: the ratio has the completion's
    value and the token's gradient. With one advantage per completion and ``sequence_mean`` it is
    the paper's loss; advantages per token multiply the gradients of their tokens.

    Args:
        logprobs: ``[B, T]`` the current student's, with gradient.
        old_logprobs: ``[B, T]`` the student's at rollout time; this function detaches them.
        advantages: ``[B]`` or ``[B, T]``; this function detaches them.
        mask: ``[B, T]`` bool: True on the completion's tokens.
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
    """Return CISPO's policy gradient loss, which clips the importance weight, never the gradient.

    MiniMax-M1 (arXiv 2506.13585): ``-sg(min(rho, 1 + clip_high)) A log pi``.

    Args:
        logprobs: ``[B, T]`` the current student's, with gradient.
        old_logprobs: ``[B, T]`` the student's at rollout time; this function detaches them.
        advantages: ``[B]`` or ``[B, T]``; this function detaches them.
        clip_high: the weight's upper bound is ``1 + clip_high``.

    Returns:
        ``[B, T]`` loss; the clip removes no token's gradient.
    """
    log_ratio = (logprobs - old_logprobs).detach()
    weight = log_ratio.clamp(max=math.log1p(clip_high)).exp()
    return -weight * _per_token(advantages, logprobs) * logprobs


def luffy_surrogate(logprobs: Tensor, advantages: Tensor, gamma: float = 0.1) -> Tensor:
    """Return LUFFY's shaped, unclipped surrogate for the tokens of a teacher's completion.

    LUFFY (arXiv 2504.14945): ``-f(pi) A`` with ``f(x) = x / (x + gamma)``, which keeps the gradient
    of tokens that are improbable for the student.

    Args:
        logprobs: ``[B, T]`` the current student's, with gradient.
        advantages: ``[B]`` or ``[B, T]``; this function detaches them.
        gamma: probability at which f is one half, above 0.

    Returns:
        ``[B, T]`` loss.

    >>> luffy_surrogate(torch.tensor([[0.1]]).log(), torch.tensor([1.0]))
    tensor([[-0.5000]])
    """
    # x / (x + gamma) is a sigmoid of log x, which needs no division and cannot underflow.
    return -_per_token(advantages, logprobs) * (logprobs - math.log(gamma)).sigmoid()


def trrd_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    trrd_alpha: float | Tensor = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    offset_clamp: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """Return TRRD's loss: a clipped surrogate whose ratio has old student and teacher as anchors.

    Trust Region Ratio Distillation is RLAD's surrogate (arXiv 2602.22495, Eq. 3 and 4), with alpha
    as in Eq. 3: alpha = 1 is GRPO, bit for bit.

    ``r = (pi/pi_old)^alpha (pi/pi_T)^(1-alpha)``, loss ``-min(r A, clip(r) A)``. It equals
    ``-w min(rho A, clip(rho, (1-clip_low)/w, (1+clip_high)/w) A)`` with the constant
    ``w = (pi_old/pi_T)^(1-alpha)``: the teacher scales a token's gradient and moves its clip bound.
    At ``pi = pi_old`` the clip removes the gradient of a rewarded token if
    ``pi_old/pi_T > (1+clip_high)^(1/(1-alpha))``, and of a punished one if it is below
    ``(1-clip_low)^(1/(1-alpha))``.

    Args:
        logprobs: ``[B, T]`` the current student's, with gradient.
        old_logprobs: ``[B, T]`` the student's at rollout time; this function detaches them.
        teacher_logprobs: ``[B, T]`` the frozen teacher's; this function detaches them.
        advantages: ``[B]`` or ``[B, T]``; this function detaches them.
        trrd_alpha: weight of the old student's anchor, in [0, 1]: a number, or ``[B, T]``.
        clip_low: the ratio's lower bound is ``1 - clip_low``.
        clip_high: the ratio's upper bound is ``1 + clip_high``.
        offset_clamp: bound on ``|log pi_old - log pi_T|``, see ``trrd_log_ratio``; None: no bound.
        dual_clip: upper bound on the ratio for A < 0, above 1; None: no bound.
        log_ratio_clamp: bound on ``|log pi - log pi_T|``, in place of ``offset_clamp``.

    Returns:
        ``[B, T]`` loss; for A = 0 its gradient is exactly 0.

    Raises:
        ConfigurationError: both clamps are given.
    """
    anchors = (logprobs, old_logprobs, teacher_logprobs)
    log_ratio = trrd_log_ratio(*anchors, trrd_alpha, offset_clamp, log_ratio_clamp)
    return _clipped(log_ratio, advantages, clip_low, clip_high, dual_clip)


def trrd_log_ratio(
    logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    trrd_alpha: float | Tensor = 0.5,
    offset_clamp: float | None = None,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """Return the log of TRRD's ratio: ``alpha log(pi/pi_old) + (1 - alpha) log(pi/pi_T)``.

    RLAD (arXiv 2602.22495, Eq. 3). One of two clamps can limit a large distance to the teacher:

    - ``log_ratio_clamp`` (App. B) bounds the current student's ``lp - lp_T``, inside the graph:
      ``alpha log rho + (1 - alpha) clamp(lp - lp_T)``. If it acts on a token, the second summand
      has no gradient, so the token's gradient has weight alpha.
    - ``offset_clamp`` [our choice] bounds the old student's distance ``o = lp_old - lp_T``, without
      gradient: ``log rho + (1 - alpha) clamp(o)``. The token's gradient always has weight 1.

    Both give the same value at rho = 1.

    Args:
        logprobs: ``[B, T]`` the current student's, with gradient.
        old_logprobs: ``[B, T]`` the student's at rollout time; this function detaches them.
        teacher_logprobs: ``[B, T]`` the frozen teacher's; this function detaches them.
        trrd_alpha: weight of the old student's anchor, in [0, 1]: a number, or ``[B, T]``.
        offset_clamp: bound on ``|o|`` in nats; None: no bound.
        log_ratio_clamp: bound on ``|lp - lp_T|`` in nats, 1.0 in the paper; None: no bound.

    Returns:
        ``[B, T]`` log-ratio with the gradient of ``logprobs``.

    Raises:
        ConfigurationError: both clamps are given.
    """
    refuse_two_clamps(offset_clamp, log_ratio_clamp)
    log_rho = logprobs - old_logprobs.detach()
    if not isinstance(trrd_alpha, Tensor) and trrd_alpha == 1.0:
        return log_rho
    if log_ratio_clamp is not None:
        to_teacher = (logprobs - teacher_logprobs.detach()).clamp(-log_ratio_clamp, log_ratio_clamp)
        return trrd_alpha * log_rho + (1.0 - trrd_alpha) * to_teacher
    offset = (old_logprobs - teacher_logprobs).detach()
    if offset_clamp is not None:
        offset = offset.clamp(-offset_clamp, offset_clamp)
    return log_rho + (1.0 - trrd_alpha) * offset


def refuse_two_clamps(offset_clamp: float | None, log_ratio_clamp: float | None) -> None:
    """Raise ``ConfigurationError`` if both clamps of TRRD's ratio are given."""
    if offset_clamp is not None and log_ratio_clamp is not None:
        raise ConfigurationError(
            f"`log_ratio_clamp` must not be set with an `offset_clamp` of {offset_clamp}: got "
            f"{log_ratio_clamp}. Leave `offset_clamp` out for the paper's clamp."
        )


def _clipped(
    log_ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Return ``-min(r A, clip(r) A)``; the sign of A says which of the two bounds can act.

    We clip before the exponential, so that a clipped ratio cannot overflow into 0 * inf.
    """
    advantages = _per_token(advantages, log_ratio)
    # An upper bound too large for the dtype is no bound. `new_full` copies nothing from the host.
    most = torch.finfo(log_ratio.dtype).max
    high = log_ratio.new_full((), clip_high if clip_high <= most else math.inf).log1p()
    low = log_ratio.new_full((), -clip_low).log1p()
    fence = torch.where(advantages < 0, low, high)
    dead = torch.where(advantages < 0, log_ratio < fence, log_ratio > fence)
    if dual_clip is not None:
        far = (advantages < 0) & (log_ratio > math.log(dual_clip))
        fence, dead = torch.where(far, math.log(dual_clip), fence), dead | far
    return -advantages * torch.where(dead, fence, log_ratio).exp()


def _per_token(advantages: Tensor, like: Tensor) -> Tensor:
    """Return the detached advantages; ``[B]`` becomes ``[B, 1]``."""
    advantages = advantages.detach()
    return advantages.unsqueeze(-1) if advantages.dim() == like.dim() - 1 else advantages
