"""Divergences between student and teacher: on sampled tokens, and over the full vocabulary.

The sampled-token estimators are Schulman's k1, k2, k3 with R = log pi_T - log pi_theta. What each
one's *gradient* estimates on the student's own samples (per position, prefix held fixed) differs
from what its value estimates, and stands in each docstring.
"""

from __future__ import annotations

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
    of KL(student || teacher); the value is biased upwards.

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


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # The difference is masked before the product: 0 * inf has no defined gradient.
    gap = torch.where(log_p > -torch.inf, log_p - log_q, 0.0)
    return (log_p.exp() * gap).sum(-1)
