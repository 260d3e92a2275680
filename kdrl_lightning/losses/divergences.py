"""Divergences between student and teacher: on sampled tokens, and over the full vocabulary.

The sampled-token estimators are Schulman's k1, k2, k3 with R = log pi_T - log pi_theta. What each
one's *gradient* estimates on the student's own samples (per position, prefix held fixed) differs
from what its value estimates, and stands in each docstring.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def k1(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Sampled-token value ``-R``: a metric, not a loss.

    Its value is an unbiased estimate of KL(student || teacher); its expected gradient is **zero**
    (the score function has mean 0), so no objective takes it as a loss.

    Args:
        logprobs: ``[B, T]`` student log-probabilities of the sampled tokens.
        teacher_logprobs: ``[B, T]`` the teacher's; detached here.

    Returns:
        ``[B, T]`` nats, of either sign.
    """
    return logprobs - teacher_logprobs.detach()


def k2(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Sampled-token loss ``R^2 / 2``: its gradient is reverse KL's, exactly.

    KDRL (arXiv 2506.02208, Eq. 8; its default). The expected gradient over student samples is that
    of KL(student || teacher); the value is a biased estimate of it.

    Args:
        logprobs: ``[B, T]`` student log-probabilities of the sampled tokens, with gradient.
        teacher_logprobs: ``[B, T]`` the teacher's; detached here.

    Returns:
        ``[B, T]`` non-negative loss.

    >>> k2(torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([2.])
    """
    return 0.5 * (teacher_logprobs.detach() - logprobs).square()


def k3(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Sampled-token loss ``e^R - R - 1``: its gradient is **forward** KL's.

    The value is an unbiased, non-negative estimate of KL(student || teacher), but as a bare loss
    on student samples its expected gradient is that of KL(teacher || student).

    Args:
        logprobs: ``[B, T]`` student log-probabilities of the sampled tokens, with gradient.
        teacher_logprobs: ``[B, T]`` the teacher's; detached here.

    Returns:
        ``[B, T]`` non-negative loss.
    """
    gap = teacher_logprobs.detach() - logprobs
    return gap.expm1() - gap


def policy_gradient_kl(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Sampled-token loss ``-sg(R) log pi``: a policy gradient with advantage R.

    Its gradient is k2's, and so reverse KL's, exactly; the value has no meaning of its own.

    Args:
        logprobs: ``[B, T]`` student log-probabilities of the sampled tokens, with gradient.
        teacher_logprobs: ``[B, T]`` the teacher's; detached here.

    Returns:
        ``[B, T]`` loss.
    """
    return -(teacher_logprobs - logprobs).detach() * logprobs


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher) over the full vocabulary, mode-seeking; teacher detached.

    ``sum_v p_S(v) (log p_S(v) - log p_T(v))``; entries with p_S = 0 count 0.

    Args:
        student_logits: ``[..., V]`` unnormalised log-probabilities, with gradient.
        teacher_logits: ``[..., V]`` the teacher's; detached here.

    Returns:
        ``[...]`` nats, at least 0; infinite where the teacher excludes what the student allows.

    >>> reverse_kl(torch.zeros(1, 4), torch.zeros(1, 4))
    tensor([0.])
    """
    return _kl(student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) over the full vocabulary, mass-covering; teacher detached.

    ``sum_v p_T(v) (log p_T(v) - log p_S(v))``; entries with p_T = 0 count 0.

    Args:
        student_logits: ``[..., V]`` unnormalised log-probabilities, with gradient.
        teacher_logits: ``[..., V]`` the teacher's; detached here.

    Returns:
        ``[...]`` nats, at least 0; infinite where the student excludes what the teacher allows.
    """
    return _kl(teacher_logits.detach().log_softmax(-1), student_logits.log_softmax(-1))


def generalized_jsd(student_logits: Tensor, teacher_logits: Tensor, jsd_beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence over the full vocabulary; teacher detached.

    GKD (arXiv 2306.13649): ``beta KL(T || M) + (1 - beta) KL(S || M)`` with the mixture
    ``M = beta T + (1 - beta) S``. The ends are defined as KL(T || S) at 0 and KL(S || T) at 1,
    the limits of the divergence over ``beta`` and over ``1 - beta``.

    Args:
        student_logits: ``[..., V]`` unnormalised log-probabilities, with gradient.
        teacher_logits: ``[..., V]`` the teacher's; detached here.
        jsd_beta: weight of the teacher in the mixture, in [0, 1].

    Returns:
        ``[...]`` nats, at least 0; between the ends finite whatever the supports.

    >>> generalized_jsd(torch.zeros(1, 4), torch.zeros(1, 4), 0.5)
    tensor([0.])
    """
    if jsd_beta == 0.0:
        return forward_kl(student_logits, teacher_logits)
    if jsd_beta == 1.0:
        return reverse_kl(student_logits, teacher_logits)
    student = student_logits.log_softmax(-1)
    teacher = teacher_logits.detach().log_softmax(-1)
    # Where both are -inf the gradient of logaddexp is NaN; e^-10000 is 0 as well.
    student_part = student.clamp(min=-1e4) + math.log1p(-jsd_beta)
    mixture = torch.logaddexp(student_part, teacher.clamp(min=-1e4) + math.log(jsd_beta))
    return jsd_beta * _kl(teacher, mixture) + (1.0 - jsd_beta) * _kl(student, mixture)


def with_tail(topk_logprobs: Tensor, tail_logprobs: Tensor | None = None) -> Tensor:
    """Add one bucket with the mass of all tokens that are not among the K.

    Log-probabilities are unnormalised ones too: the divergences take the result as logits.

    Args:
        topk_logprobs: ``[..., K]`` log-probabilities of K different tokens.
        tail_logprobs: ``[...]`` of the rest, as ``token_scores`` finds it; None takes what the K
            leave of 1, which is at least about e^-16 (float32) and cannot tell smaller ones apart.

    Returns:
        ``[..., K + 1]``, summing to 1 after exp.

    >>> with_tail(torch.tensor([0.5, 0.25]).log()).exp()
    tensor([0.5000, 0.2500, 0.2500])
    """
    if tail_logprobs is not None:
        return torch.cat([topk_logprobs, tail_logprobs.unsqueeze(-1)], -1)
    tiny = torch.finfo(topk_logprobs.dtype).eps
    mass = topk_logprobs.exp().sum(-1, keepdim=True)
    return torch.cat([topk_logprobs, (1.0 - mass).clamp(min=tiny).log()], -1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # The difference is masked before the product: 0 * inf has no defined gradient.
    gap = torch.where(log_p > -torch.inf, log_p - log_q, 0.0)
    return (log_p.exp() * gap).sum(-1)
