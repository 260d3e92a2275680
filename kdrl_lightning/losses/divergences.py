"""Divergences between student and teacher: on sampled tokens, and over the full vocabulary.

The sampled-token estimators are Schulman's k1, k2, k3 with R = log pi_T - log pi_theta. On student
samples (per position, prefix held fixed), the *gradient* of an estimator can estimate a different
divergence than its value. Each docstring names both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def k1(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Return the sampled-token value ``-R``: a metric, not a loss.

    The value is an unbiased estimate of KL(student || teacher). The expected gradient is **zero**
    (the score function has mean 0), so no objective takes k1 as a loss.

    Args:
        logprobs: ``[B, T]`` student log-probabilities of the sampled tokens.
        teacher_logprobs: ``[B, T]`` the teacher's; this function detaches them.

    Returns:
        ``[B, T]`` nats, of either sign.
    """
    return logprobs - teacher_logprobs.detach()


def k2(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Return the sampled-token loss ``R^2 / 2``; its expected gradient is exactly reverse KL's.

    KDRL (arXiv 2506.02208, Eq. 8) uses it by default. The expected gradient over student samples is
    that of KL(student || teacher); the value is a biased estimate of this KL.

    Args:
        logprobs: ``[B, T]`` student log-probabilities of the sampled tokens, with gradient.
        teacher_logprobs: ``[B, T]`` the teacher's; this function detaches them.

    Returns:
        ``[B, T]`` non-negative loss.

    >>> k2(torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([2.])
    """
    return 0.5 * (teacher_logprobs.detach() - logprobs).square()


def k3(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Return the sampled-token loss ``e^R - R - 1``; its expected gradient is **forward** KL's.

    The value is an unbiased, non-negative estimate of KL(student || teacher), but the expected
    gradient of this bare loss over student samples is that of KL(teacher || student).

    Args:
        logprobs: ``[B, T]`` student log-probabilities of the sampled tokens, with gradient.
        teacher_logprobs: ``[B, T]`` the teacher's; this function detaches them.

    Returns:
        ``[B, T]`` non-negative loss.
    """
    gap = teacher_logprobs.detach() - logprobs
    return gap.expm1() - gap


def policy_gradient_kl(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Return the sampled-token loss ``-sg(R) log pi``: a policy gradient with advantage R.

    Its gradient equals k2's, so its expected gradient is exactly reverse KL's. The value estimates
    nothing.

    Args:
        logprobs: ``[B, T]`` student log-probabilities of the sampled tokens, with gradient.
        teacher_logprobs: ``[B, T]`` the teacher's; this function detaches them.

    Returns:
        ``[B, T]`` loss.
    """
    return -(teacher_logprobs - logprobs).detach() * logprobs


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(student || teacher) over the full vocabulary, which is mode-seeking.

    ``sum_v p_S(v) (log p_S(v) - log p_T(v))``; entries with p_S = 0 contribute 0.

    Args:
        student_logits: ``[..., V]`` unnormalised log-probabilities, with gradient.
        teacher_logits: ``[..., V]`` the teacher's; this function detaches them.

    Returns:
        ``[...]`` nats, at least 0; infinite if only the teacher gives a token probability 0.

    >>> reverse_kl(torch.zeros(1, 4), torch.zeros(1, 4))
    tensor([0.])
    """
    return _kl(student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(teacher || student) over the full vocabulary, which is mass-covering.

    ``sum_v p_T(v) (log p_T(v) - log p_S(v))``; entries with p_T = 0 contribute 0.

    Args:
        student_logits: ``[..., V]`` unnormalised log-probabilities, with gradient.
        teacher_logits: ``[..., V]`` the teacher's; this function detaches them.

    Returns:
        ``[...]`` nats, at least 0; infinite if only the student gives a token probability 0.
    """
    return _kl(teacher_logits.detach().log_softmax(-1), student_logits.log_softmax(-1))


def clipped_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, clip: float | None = 0.05
) -> Tensor:
    """Return KL(teacher || student) with each token's summand capped: OPSD (arXiv 2601.18734 v3).

    ``sum_v min(p_T(v) (log p_T(v) - log p_S(v)), clip)``. Capped summands have no gradient.
    Negative ones are never capped, so the sum can be **negative**: it is not a divergence.

    Args:
        student_logits: ``[..., V]`` unnormalised log-probabilities, with gradient.
        teacher_logits: ``[..., V]`` the teacher's; this function detaches them.
        clip: largest summand, in nats; None: no cap, as in ``forward_kl``.

    Returns:
        ``[...]`` nats, of either sign.
    """
    log_p, log_q = teacher_logits.detach().log_softmax(-1), student_logits.log_softmax(-1)
    summands = _summands(log_p, log_q)
    return (summands if clip is None else summands.clamp(max=clip)).sum(-1)


def generalized_jsd(student_logits: Tensor, teacher_logits: Tensor, jsd_beta: float) -> Tensor:
    """Return the generalised Jensen-Shannon divergence over the full vocabulary.

    GKD (arXiv 2306.13649): ``beta KL(T || M) + (1 - beta) KL(S || M)`` with the mixture
    ``M = beta T + (1 - beta) S``. It is KL(T || S) at beta = 0 and KL(S || T) at beta = 1: the
    limits of the divergence divided by ``beta`` and by ``1 - beta``.

    Args:
        student_logits: ``[..., V]`` unnormalised log-probabilities, with gradient.
        teacher_logits: ``[..., V]`` the teacher's; this function detaches them.
        jsd_beta: weight of the teacher in the mixture, in [0, 1].

    Returns:
        ``[...]`` nats, at least 0; always finite for 0 < beta < 1.

    >>> generalized_jsd(torch.zeros(1, 4), torch.zeros(1, 4), 0.5)
    tensor([0.])
    """
    if jsd_beta == 0.0:
        return forward_kl(student_logits, teacher_logits)
    if jsd_beta == 1.0:
        return reverse_kl(student_logits, teacher_logits)
    student = student_logits.log_softmax(-1)
    teacher = teacher_logits.detach().log_softmax(-1)
    # If both are -inf, the gradient of logaddexp is NaN. We use -10000 instead: its exp is 0, too.
    student_part = student.clamp(min=-1e4) + math.log1p(-jsd_beta)
    mixture = torch.logaddexp(student_part, teacher.clamp(min=-1e4) + math.log(jsd_beta))
    return jsd_beta * _kl(teacher, mixture) + (1.0 - jsd_beta) * _kl(student, mixture)


def with_tail(topk_logprobs: Tensor, tail_logprobs: Tensor | None = None) -> Tensor:
    """Append a bucket for all other tokens to the log-probabilities of K tokens.

    Log-probabilities are valid logits, so you can pass the result to the divergences.

    Args:
        topk_logprobs: ``[..., K]`` log-probabilities of K different tokens.
        tail_logprobs: ``[...]`` log-probability of all other tokens together, as ``token_scores``
            computes it; None: one minus the probability of the K tokens, which in float32 never
            falls below about e^-16.

    Returns:
        ``[..., K + 1]`` log-probabilities; their exponentials sum to 1.

    >>> with_tail(torch.tensor([0.5, 0.25]).log()).exp()
    tensor([0.5000, 0.2500, 0.2500])
    """
    if tail_logprobs is not None:
        return torch.cat([topk_logprobs, tail_logprobs.unsqueeze(-1)], -1)
    tiny = torch.finfo(topk_logprobs.dtype).eps
    mass = topk_logprobs.exp().sum(-1, keepdim=True)
    return torch.cat([topk_logprobs, (1.0 - mass).clamp(min=tiny).log()], -1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _summands(log_p, log_q).sum(-1)


def _summands(log_p: Tensor, log_q: Tensor) -> Tensor:
    # We mask the difference before the product, because the gradient of 0 * inf is NaN.
    gap = torch.where(log_p > -torch.inf, log_p - log_q, 0.0)
    return log_p.exp() * gap
