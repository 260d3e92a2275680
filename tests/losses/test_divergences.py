"""Sampled-token estimators and full-vocabulary divergences, by exact enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from helpers.reference import (
    close,
    f64,
    forward_kl_gradient,
    kl,
    log_softmax,
    normal,
    reverse_kl_gradient,
)
from kdrl_lightning.losses import clipped_surrogate, forward_kl, k1, k2, k3, reverse_kl

V = 5
INF = math.inf
Estimator = Callable[[Tensor, Tensor], Tensor]


def policy_gradient(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    gap = (teacher_logprobs - logprobs).detach()
    return clipped_surrogate(logprobs[None], logprobs.detach()[None], gap[None])[0]


def pair(seed: int) -> tuple[Tensor, Tensor, list[float], list[float]]:
    student, teacher = normal(V, seed=seed), normal(V, seed=seed + 100)
    return (
        student.requires_grad_(),
        teacher,
        log_softmax(student.tolist()),
        log_softmax(teacher.tolist()),
    )


def expected_gradient(estimator: Estimator, student: Tensor, teacher: Tensor) -> Tensor:
    logprobs = student.log_softmax(-1)
    samples = logprobs.detach().exp()
    (gradient,) = torch.autograd.grad(
        (samples * estimator(logprobs, teacher.log_softmax(-1))).sum(), student
    )
    return gradient


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [(k1, None), (k2, "reverse"), (k3, "forward"), (policy_gradient, "reverse")],
    ids=["k1-zero", "k2-reverse", "k3-forward", "pg-reverse"],
)
def test_expected_gradient_over_student_samples(
    estimator: Estimator, divergence: str | None, seed: int
) -> None:
    student, teacher, log_p, log_q = pair(seed)
    expected = {
        None: [0.0] * V,
        "reverse": reverse_kl_gradient(log_p, log_q),
        "forward": forward_kl_gradient(log_p, log_q),
    }[divergence]
    close(expected_gradient(estimator, student, teacher), expected)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_behind_a_differentiable_ratio_k1_and_k3_give_reverse_kl(estimator: Estimator) -> None:
    student, teacher, log_p, log_q = pair(0)
    logprobs = student.log_softmax(-1)
    values = logprobs.exp() * estimator(logprobs, teacher.log_softmax(-1))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    close(values.sum(), kl(log_p, log_q))
    close(gradient, reverse_kl_gradient(log_p, log_q))


def test_k2_with_detached_ratio_gives_reverse_kl_off_policy() -> None:
    student, teacher, log_p, log_q = pair(1)
    old = normal(V, seed=7).log_softmax(-1)
    logprobs = student.log_softmax(-1)
    ratio = (logprobs - old).exp().detach()
    loss = (old.exp() * ratio * k2(logprobs, teacher.log_softmax(-1))).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    close(gradient, reverse_kl_gradient(log_p, log_q))


def test_values_by_hand() -> None:
    # R = log pi_T - log pi = -3 - (-1) = -2
    logprobs, teacher = f64([-1.0]), f64([-3.0])
    close(k1(logprobs, teacher), [2.0])
    close(k2(logprobs, teacher), [2.0])
    close(k3(logprobs, teacher), [math.exp(-2) + 2 - 1])
    # p = (1/2, 1/2), q = (1/4, 3/4)
    p, q = f64([0.0, 0.0]), f64([0.0, math.log(3)])
    close(reverse_kl(p, q), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    close(forward_kl(p, q), 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_values_are_unbiased(estimator: Estimator) -> None:
    student, teacher, log_p, log_q = pair(2)
    logprobs = student.log_softmax(-1)
    value = (logprobs.exp() * estimator(logprobs, teacher.log_softmax(-1))).sum()
    close(value, kl(log_p, log_q))


def test_k3_keeps_digits_near_zero() -> None:
    # e^R - R - 1 = R^2/2 + R^3/6 + ...; computed naively it is pure rounding at R = 1e-7.
    value = k3(f64([-1e-7]), f64([0.0]))
    close(value / 5e-15, [1.0], 1e-6)  # 1e-7 of it is the next term, the rest cancellation


@pytest.mark.parametrize("seed", range(3))
def test_full_vocabulary_divergences_match_definition(seed: int) -> None:
    student, teacher, log_p, log_q = pair(seed)
    p, q = Categorical(logits=student), Categorical(logits=teacher)
    reverse, forward = reverse_kl(student, teacher), forward_kl(student, teacher)
    close(reverse, kl(log_p, log_q))
    close(forward, kl(log_q, log_p))
    close(reverse, kl_divergence(p, q))
    close(forward, kl_divergence(q, p))
    (gradient,) = torch.autograd.grad(reverse, student)
    close(gradient, reverse_kl_gradient(log_p, log_q))
    (gradient,) = torch.autograd.grad(forward, student)
    close(gradient, forward_kl_gradient(log_p, log_q))


def test_leading_dimensions_are_kept() -> None:
    student, teacher = normal(2, 3, V, seed=1), normal(2, 3, V, seed=2)
    for divergence in (reverse_kl, forward_kl):
        rows = [
            divergence(s, t) for s, t in zip(student.view(6, V), teacher.view(6, V), strict=True)
        ]
        close(divergence(student, teacher), torch.stack(rows).view(2, 3))


LOGITS = st.lists(st.floats(-20, 20), min_size=4, max_size=4)


@given(LOGITS, LOGITS, st.floats(-50, 50), st.floats(-50, 50))
def test_divergences_are_nonnegative_and_ignore_constants(
    student: list[float], teacher: list[float], a: float, b: float
) -> None:
    s, t = f64(student), f64(teacher)
    for divergence in (reverse_kl, forward_kl):
        value = divergence(s, t)
        # Sums of terms up to 40 in float64.
        assert value >= -1e-13
        close(divergence(s + a, t + b), value)
        close(divergence(s, s), 0.0)


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_estimators_of_equals_are_zero_and_k2_k3_nonnegative(lp: float, lt: float) -> None:
    logprobs = torch.tensor([lp], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([lt], dtype=torch.float64)
    assert k2(logprobs, teacher) >= 0
    assert k3(logprobs, teacher) >= 0
    for estimator in (k1, k2, k3):
        assert estimator(logprobs, logprobs.detach()) == 0
    for estimator in (k2, k3, policy_gradient):
        value = estimator(logprobs, logprobs.detach()).sum()
        (gradient,) = torch.autograd.grad(value, logprobs)
        assert gradient == 0


@pytest.mark.parametrize("divergence", [k1, k2, k3, reverse_kl, forward_kl])
def test_teacher_never_gets_gradient(divergence: Estimator) -> None:
    student = normal(2, V, seed=1).requires_grad_()
    teacher = normal(2, V, seed=2).requires_grad_()
    divergence(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def grads(divergence: Estimator, student: list[float], teacher: list[float]) -> tuple[float, list]:
    s = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    value = divergence(s, torch.tensor(teacher, dtype=torch.float64))
    value.backward()
    assert s.grad is not None
    return value.item(), s.grad.tolist()


@pytest.mark.parametrize(
    ("divergence", "student", "teacher"),
    [
        (reverse_kl, [0.0, -INF, 0.0], [0.0, -INF, 1.0]),
        (forward_kl, [0.0, -INF, 0.0], [0.0, -INF, 1.0]),
        (reverse_kl, [0.0, -INF, 0.0], [0.0, 2.0, 1.0]),
        (forward_kl, [0.0, 2.0, 0.0], [0.0, -INF, 1.0]),
    ],
)
def test_excluded_tokens_count_nothing(
    divergence: Estimator, student: list[float], teacher: list[float]
) -> None:
    log_p = log_softmax([max(x, -800.0) for x in student])
    log_q = log_softmax([max(x, -800.0) for x in teacher])
    # exp(-800) is 0 in float64, so the definition below drops the excluded token's term.
    p, q = (log_p, log_q) if divergence is reverse_kl else (log_q, log_p)
    gradient_of = reverse_kl_gradient if divergence is reverse_kl else forward_kl_gradient
    value, gradient = grads(divergence, student, teacher)
    close(value, kl(p, q))
    close(gradient, gradient_of(log_p, log_q))


def test_reverse_kl_is_infinite_where_the_teacher_excludes() -> None:
    assert reverse_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, -INF])) == INF


def test_forward_kl_is_infinite_where_the_student_excludes_and_its_gradient_is_finite() -> None:
    value, gradient = grads(forward_kl, [0.0, -INF], [0.0, 0.0])
    assert value == INF
    close(gradient, [0.5, -0.5])


def sequence_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two steps over three tokens: logits of the first, and of the second given the first."""
    return (
        normal(3, seed=1).requires_grad_(),
        normal(3, 3, seed=2).requires_grad_(),
        normal(3, seed=3).log_softmax(-1),
        normal(3, 3, seed=4).log_softmax(-1),
    )


def sequence_gradient() -> tuple[Tensor, Tensor]:
    """Of KL over the nine sequences."""
    first, second, teacher_first, teacher_second = sequence_case()
    joint = first.log_softmax(-1)[:, None] + second.log_softmax(-1)
    teacher = teacher_first[:, None] + teacher_second
    value = (joint.exp() * (joint - teacher)).sum()
    return torch.autograd.grad(value, (first, second))


@pytest.mark.parametrize("estimator", [k1, k2, k3, policy_gradient])
def test_no_estimator_is_the_gradient_of_the_sequence_kl(estimator: Estimator) -> None:
    first, second, teacher_first, teacher_second = sequence_case()
    log_first, log_second = first.log_softmax(-1), second.log_softmax(-1)
    probability = (log_first[:, None] + log_second).exp().detach()
    per_sequence = torch.zeros(3, 3, dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            tokens = torch.stack([log_first[a], log_second[a, b]])
            teacher = torch.stack([teacher_first[a], teacher_second[a, b]])
            per_sequence[a, b] = estimator(tokens, teacher).sum()
    got = torch.autograd.grad((probability * per_sequence).sum(), (first, second))
    exact = sequence_gradient()
    assert (got[0] - exact[0]).abs().max() > 1e-2
    if estimator in (k2, policy_gradient):
        # Missing is the reward-to-go: what the first token does to the second step's divergence.
        later = (log_second.exp() * (log_second - teacher_second)).sum(-1).detach()
        (to_go,) = torch.autograd.grad((first.softmax(-1) * later).sum(), first)
        close(got[0] + to_go, exact[0])
        close(got[1], exact[1])
