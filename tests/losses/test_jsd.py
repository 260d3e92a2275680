"""The generalised divergence of GKD, and top-k with a bucket for the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from helpers.reference import close, f64, kl, log_softmax, normal
from kdrl_lightning.losses import forward_kl, generalized_jsd, reverse_kl, with_tail
from kdrl_lightning.objectives.divergences import floored_jsd

INF = math.inf
LOGITS = st.lists(st.floats(-15, 15), min_size=4, max_size=4)
BETA = st.floats(0.01, 0.99)


def jsd(log_p: list[float], log_q: list[float], beta: float) -> float:
    """Of student p and teacher q, by its definition."""
    m = [
        math.log((1 - beta) * math.exp(a) + beta * math.exp(b))
        for a, b in zip(log_p, log_q, strict=True)
    ]
    return beta * kl(log_q, m) + (1 - beta) * kl(log_p, m)


def graded(student: Any, teacher: Any, beta: float) -> tuple[Tensor, Tensor]:
    leaf = f64(student).clone().requires_grad_()
    value = generalized_jsd(leaf, f64(teacher), beta)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


@given(LOGITS, LOGITS, BETA)
def test_value_and_gradient_match_the_definition(
    student: list[float], teacher: list[float], beta: float
) -> None:
    log_p, log_q = log_softmax(student), log_softmax(teacher)
    value, gradient = graded(student, teacher, beta)
    close(value, jsd(log_p, log_q, beta))
    # d/dp_j is (1 - beta) log(p_j / m_j) up to a constant; through the softmax it is centred.
    slopes = [
        (1 - beta) * (a - math.log((1 - beta) * math.exp(a) + beta * math.exp(b)))
        for a, b in zip(log_p, log_q, strict=True)
    ]
    mean = sum(math.exp(a) * s for a, s in zip(log_p, slopes, strict=True))
    close(gradient, [math.exp(a) * (s - mean) for a, s in zip(log_p, slopes, strict=True)])


@given(LOGITS, LOGITS)
def test_the_ends_are_forward_and_reverse_kl(student: list[float], teacher: list[float]) -> None:
    s, t = f64(student), f64(teacher)
    assert torch.equal(generalized_jsd(s, t, 0.0), forward_kl(s, t))
    assert torch.equal(generalized_jsd(s, t, 1.0), reverse_kl(s, t))


@pytest.mark.parametrize("seed", range(3))
def test_the_limits_are_forward_and_reverse_kl(seed: int) -> None:
    student, teacher = normal(5, seed=seed), normal(5, seed=seed + 9)
    tiny = 1e-6  # the next term is of this size
    close(generalized_jsd(student, teacher, tiny) / tiny, forward_kl(student, teacher), 1e-4)
    close(generalized_jsd(student, teacher, 1 - tiny) / tiny, reverse_kl(student, teacher), 1e-4)


@given(LOGITS, LOGITS, BETA, st.floats(-50, 50), st.floats(-50, 50))
def test_laws(student: list[float], teacher: list[float], beta: float, a: float, b: float) -> None:
    s, t = f64(student), f64(teacher)
    value = generalized_jsd(s, t, beta)
    close(value, generalized_jsd(t, s, 1 - beta))
    close(generalized_jsd(s + a, t + b, beta), value)
    close(generalized_jsd(s, s, beta), 0.0)
    assert value >= -1e-14  # rounding
    # Bounded by the entropy of the coin that picks the side.
    assert value <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-12
    order = torch.tensor([2, 0, 3, 1])
    close(generalized_jsd(s[order], t[order], beta), value)


def test_leading_dimensions_are_kept() -> None:
    student, teacher = normal(2, 3, 5, seed=1), normal(2, 3, 5, seed=2)
    got = generalized_jsd(student, teacher, 0.3)
    for i in range(2):
        for j in range(3):
            close(got[i, j], generalized_jsd(student[i, j], teacher[i, j], 0.3))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_teacher_gets_no_gradient(beta: float) -> None:
    student, teacher = (normal(2, 5, seed=s).requires_grad_() for s in (1, 2))
    generalized_jsd(student, teacher, beta).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.ne(0).any()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([0.0, -INF, 0.5], [0.0, -INF, 1.0]),
        ([0.0, -INF, 0.5], [0.0, 2.0, 1.0]),
        ([0.0, 2.0, 0.5], [0.0, -INF, 1.0]),
        ([0.0, -INF, 0.5], [-INF, 2.0, 1.0]),
        ([0.0, -INF], [-INF, 0.0]),
    ],
)
def test_excluded_tokens_leave_value_and_gradient_finite(
    student: list[float], teacher: list[float], beta: float
) -> None:
    # exp(-700) is 5e-305: nothing compared with the rest.
    log_p, log_q = (log_softmax([max(x, -700.0) for x in row]) for row in (student, teacher))
    value, gradient = graded(student, teacher, beta)
    close(value, jsd(log_p, log_q, beta))
    near = graded([max(x, -700.0) for x in student], [max(x, -700.0) for x in teacher], beta)
    close(gradient, near[1])


def test_the_floor_keeps_reverse_kl_finite() -> None:
    student, teacher = f64([0.0, 0.0]).requires_grad_(), f64([0.0, -INF])
    assert reverse_kl(student, teacher) == INF
    value = floored_jsd(student, teacher, 1.0)
    # p = (1/2, 1/2) against (1, e^-30), normalised.
    close(value, kl([math.log(0.5)] * 2, log_softmax([0.0, -30.0])))
    assert torch.autograd.grad(value, student)[0].isfinite().all()
    spread = normal(5, seed=3)
    close(
        floored_jsd(spread, normal(5, seed=4), 0.4),
        generalized_jsd(spread, normal(5, seed=4), 0.4),
    )


# --- Top-k and the rest ---


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6), st.integers(1, 5))
def test_the_bucket_holds_what_is_missing(weights: list[float], k: int) -> None:
    assume(k < len(weights))
    p = [w / sum(weights) for w in weights]
    got = with_tail(f64(p[:k]).log())
    close(got.exp(), [*p[:k], 1 - sum(p[:k])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_rest_stays_finite(dtype: torch.dtype) -> None:
    for probabilities in ([0.5, 0.5], [0.6, 0.4 + 1e-6]):
        tail = with_tail(torch.tensor(probabilities, dtype=dtype).log())[-1]
        close(tail.exp(), torch.finfo(dtype).eps, 1e-10)


@given(LOGITS, LOGITS, BETA)
def test_all_tokens_as_top_k_are_the_whole_divergence(
    student: list[float], teacher: list[float], beta: float
) -> None:
    s = f64(student).requires_grad_()
    t = f64(teacher)
    a = generalized_jsd(with_tail(s.log_softmax(-1)), with_tail(t.log_softmax(-1)), beta)
    b = generalized_jsd(s, t, beta)
    close(a, b)
    close(torch.autograd.grad(a, s)[0], torch.autograd.grad(b, s)[0], 1e-9)  # the bucket's eps


@given(LOGITS, LOGITS, st.integers(1, 3), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_merging_tokens_cannot_raise_a_divergence(
    student: list[float], teacher: list[float], k: int, beta: float
) -> None:
    """The data processing inequality."""
    s, t = f64(student).log_softmax(-1), f64(teacher).log_softmax(-1)
    # The bucket cannot hold less than eps: e^-15 of mass leaves it digits.
    assume(min(float(x[k:].logsumexp(-1)) for x in (s, t)) > -15)
    whole = generalized_jsd(s, t, beta)
    part = generalized_jsd(with_tail(s[:k]), with_tail(t[:k]), beta)
    assert -1e-12 <= part <= whole + 1e-8
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    close(generalized_jsd(with_tail(s[:k][order]), with_tail(t[:k][order]), beta), part)


def test_top_k_gradient_is_that_of_the_merged_distributions() -> None:
    s, t = normal(6, seed=5).requires_grad_(), normal(6, seed=6)
    part = reverse_kl(with_tail(s.log_softmax(-1)[:2]), with_tail(t.log_softmax(-1)[:2]))
    p, q = s.softmax(-1), t.softmax(-1)
    merged = torch.stack([p[0], p[1], p[2:].sum()])
    other = torch.stack([q[0], q[1], q[2:].sum()])
    expected = (merged * (merged / other).log()).sum()
    close(part, expected)
    close(torch.autograd.grad(part, s)[0], torch.autograd.grad(expected, s)[0])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_teacher_equal_to_the_student_teaches_nothing(beta: float) -> None:
    logits = normal(5, seed=8)
    value, gradient = graded(logits, logits, beta)
    close(value, 0.0)
    close(gradient, [0.0] * 5)
    leaf = logits.clone().requires_grad_()
    both = (with_tail(x.log_softmax(-1)[:2]) for x in (leaf, logits))
    close(torch.autograd.grad(generalized_jsd(*both, beta), leaf)[0], [0.0] * 5)
