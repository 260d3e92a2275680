"""Expected gradients by exact enumeration: what each loss teaches, not what one sample shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.reference import (
    close,
    f64,
    forward_kl_gradient,
    log_softmax,
    normal,
    reverse_kl_gradient,
)
from kdrl_lightning.losses import (
    cispo_surrogate,
    clipped_surrogate,
    importance_weights,
    k1,
    k2,
    k3,
    luffy_surrogate,
    policy_gradient_kl,
    reverse_kl,
    sequence_surrogate,
    trrd_surrogate,
    with_tail,
)

V = 5
Estimator = Callable[[Tensor, Tensor], Tensor]
TABLE: list[tuple[Estimator, str]] = [
    (k1, "zero"),
    (k2, "reverse"),
    (k3, "forward"),
    (policy_gradient_kl, "reverse"),
]
table = pytest.mark.parametrize(("estimator", "divergence"), TABLE)
seeds = pytest.mark.parametrize("seed", range(3))


def case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The student's logits, and log-probs of an old student and of a teacher."""
    student = normal(V, seed=seed)
    old = (student + normal(V, seed=seed + 50, scale=0.3)).log_softmax(-1)
    return student.requires_grad_(), old, normal(V, seed=seed + 100).log_softmax(-1)


def exact(divergence: str, student: Tensor, teacher: Tensor) -> list[float]:
    log_p, log_q = log_softmax(student.tolist()), teacher.tolist()
    return {
        "zero": [0.0] * V,
        "reverse": reverse_kl_gradient(log_p, log_q),
        "forward": forward_kl_gradient(log_p, log_q),
    }[divergence]


def by(student: Tensor, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


@seeds
@table
def test_on_policy(estimator: Estimator, divergence: str, seed: int) -> None:
    student, _, teacher = case(seed)
    lp = student.log_softmax(-1)
    loss = (lp.detach().exp() * estimator(lp, teacher)).sum()
    close(by(student, loss), exact(divergence, student, teacher))


@seeds
@table
def test_samples_of_an_old_policy_need_the_detached_ratio(
    estimator: Estimator, divergence: str, seed: int
) -> None:
    student, old, teacher = case(seed)
    lp = student.log_softmax(-1)
    per_token = estimator(lp, teacher)
    weighted = (old.exp() * (lp - old).detach().exp() * per_token).sum()
    expected = f64(exact(divergence, student, teacher))
    close(by(student, weighted), expected)
    lp = student.log_softmax(-1)
    plain = by(student, (old.exp() * estimator(lp, teacher)).sum())
    assert (plain - expected).abs().max() > 1e-3


@seeds
def test_engine_weights_undo_another_sampler(seed: int) -> None:
    student, mu, teacher = case(seed)
    lp = student.log_softmax(-1)
    weights = importance_weights(lp.detach(), mu, cap=1e6)
    loss = (mu.exp() * weights * k2(lp, teacher)).sum()
    close(by(student, loss), exact("reverse", student, teacher))


@seeds
def test_full_vocabulary_needs_no_samples(seed: int) -> None:
    student, _, teacher = case(seed)
    close(
        by(student, reverse_kl(student, teacher)),
        exact("reverse", student, teacher),
    )
    # As a detached advantage it teaches nothing: the score function has mean zero.
    lp = student.log_softmax(-1)
    advantage = reverse_kl(student, teacher).detach().expand(V)
    loss = (lp.detach().exp() * clipped_surrogate(lp[None], lp[None], advantage[None])[0]).sum()
    close(by(student, loss), [0.0] * V)


@seeds
def test_top_k_is_reverse_kl_of_merged_distributions(seed: int) -> None:
    student, _, teacher = case(seed)
    ids = student.detach().topk(2).indices
    loss = reverse_kl(with_tail(student.log_softmax(-1)[ids]), with_tail(teacher[ids]))
    p, q = (x.tolist() for x in (student.softmax(-1), teacher.exp()))
    kept = ids.tolist()
    rest = [v for v in range(V) if v not in kept]
    ratio = {v: math.log(p[v] / q[v]) for v in kept}
    ratio |= dict.fromkeys(rest, math.log(sum(p[v] for v in rest) / sum(q[v] for v in rest)))
    # Score-function form: E[(log p_bucket / q_bucket) grad log p], centred by its mean.
    mean = sum(p[v] * ratio[v] for v in range(V))
    close(loss, mean)
    close(by(student, loss), [p[v] * (ratio[v] - mean) for v in range(V)])


# --- Rewards ---


def reward_gradient(student: Tensor, advantages: Tensor) -> Tensor:
    """Of minus the expected advantage under the student."""
    return by(student, -(student.softmax(-1) * advantages).sum())


@seeds
def test_unclipped_surrogates_of_any_sampler_are_the_policy_gradient(seed: int) -> None:
    student, old, teacher = case(seed)
    advantages = normal(V, seed=seed + 7)
    expected = reward_gradient(student, advantages)
    for sampler in (old, teacher):
        for loss in (
            lambda lp, mu: clipped_surrogate(lp, mu, advantages[None], 1.0, 1e9),
            lambda lp, mu: cispo_surrogate(lp, mu, advantages[None], 1e9),
        ):
            per_token = loss(student.log_softmax(-1)[None], sampler[None])[0]
            close(by(student, (sampler.exp() * per_token).sum()), expected)


@seeds
def test_cispo_truncates_weights_and_keeps_every_token(seed: int) -> None:
    student, old, _ = case(seed)
    advantages = normal(V, seed=seed + 7)
    lp = student.log_softmax(-1)
    loss = (old.exp() * cispo_surrogate(lp[None], old[None], advantages[None], 0.05)[0]).sum()
    p, q = student.softmax(-1).tolist(), old.exp().tolist()
    push = [min(a, 1.05 * b) * float(c) for a, b, c in zip(p, q, advantages, strict=True)]
    close(by(student, loss), [-push[v] + p[v] * sum(push) for v in range(V)])


@seeds
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("clamp", [None, 1.0])
def test_trrd_is_w_times_a_clip_at_moved_fences(
    alpha: float, clamp: float | None, seed: int
) -> None:
    student, old, teacher = case(seed)
    advantages = normal(V, seed=seed + 7)
    lp = student.log_softmax(-1)[None]
    loss = trrd_surrogate(lp, old[None], teacher[None], advantages[None], alpha, 0.2, 0.28, clamp)[
        0
    ]
    p, mu, t = student.softmax(-1).tolist(), old.tolist(), teacher.tolist()
    value, push = 0.0, []
    for v in range(V):
        offset = mu[v] - t[v]
        if clamp is not None:
            offset = max(-clamp, min(clamp, offset))
        w, rho, a = math.exp((1 - alpha) * offset), p[v] / math.exp(mu[v]), float(advantages[v])
        fenced = min(max(rho, 0.8 / w), 1.28 / w)
        value -= math.exp(mu[v]) * w * min(rho * a, fenced * a)
        push.append(math.exp(mu[v]) * w * a * rho if rho * a <= fenced * a else 0.0)
    expectation = (old.exp() * loss).sum()
    close(expectation, value)
    close(by(student, expectation), [-push[v] + p[v] * sum(push) for v in range(V)])


@seeds
def test_luffy_ascends_the_shaped_probability(seed: int) -> None:
    student, _, teacher = case(seed)
    advantages = normal(V, seed=seed + 7)
    loss = (
        teacher.exp() * luffy_surrogate(student.log_softmax(-1)[None], advantages[None])[0]
    ).sum()
    p = student.softmax(-1)
    close(by(student, loss), by(student, -(teacher.exp() * advantages * p / (p + 0.1)).sum()))


# --- Sequences of a bigram model: token 0 starts, all sequences of a length are enumerated ---

W = 3


def models() -> tuple[Tensor, Tensor, Tensor]:
    student = normal(W, W, seed=1)
    old = (student + normal(W, W, seed=2, scale=0.1)).log_softmax(-1)
    return student.requires_grad_(), old, normal(W, W, seed=3).log_softmax(-1)


def rows_of(length: int, *models: Tensor) -> list[Tensor]:
    """``[W^length, length]`` log-probs of all sequences, by each model."""
    sequences = torch.tensor(list(itertools.product(range(W), repeat=length)))
    previous = torch.cat([torch.zeros(len(sequences), 1, dtype=torch.long), sequences[:, :-1]], 1)
    return [m.log_softmax(-1)[previous, sequences] for m in models]


@pytest.mark.parametrize("length", [2, 3])
@table
def test_no_estimator_gives_the_sequence_kls_gradient(
    estimator: Estimator, divergence: str, length: int
) -> None:
    student, _, teacher = models()
    lp, lt = rows_of(length, student, teacher)
    probability = lp.sum(1).detach().exp()
    got = by(student, (probability[:, None] * estimator(lp, lt)).sum())
    # Each position's divergence, with the prefix's probability held fixed.
    value = torch.zeros((), dtype=torch.float64)
    state = torch.tensor([1.0] + [0.0] * (W - 1), dtype=torch.float64)
    p, t = student.log_softmax(-1), teacher
    for _ in range(length):
        reverse = (p.exp() * (p - t)).sum(-1)
        forward = (t.exp() * (t - p)).sum(-1)
        chosen = {"zero": 0.0 * reverse, "reverse": reverse, "forward": forward}[divergence]
        value = value + (state * chosen).sum()
        state = state @ p.exp().detach()
    close(got, by(student, value))
    lp, lt = rows_of(length, student, teacher)
    exact_kl = by(student, (lp.sum(1).exp() * (lp.sum(1) - lt.sum(1))).sum())
    assert (got - exact_kl).abs().max() > 1e-2
    if divergence == "reverse":  # the reward-to-go is what is missing
        lp, lt = rows_of(length, student, teacher)
        gaps = (lp - lt).detach()
        later = gaps.flip(1).cumsum(1).flip(1) - gaps
        close(got + by(student, (probability[:, None] * later * lp).sum()), exact_kl)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_gspo_over_all_sequences(length: int) -> None:
    student, old, _ = models()
    advantages = normal(W**length, seed=4)
    lp, lo = rows_of(length, student, old)
    mask = torch.ones_like(lp, dtype=torch.bool)
    loss = sequence_surrogate(lp, lo, advantages, mask, 0.02, 0.03).mean(1)
    got = by(student, (lo.sum(1).exp() * loss).sum())
    lp, _ = rows_of(length, student, old)
    s = (lp.sum(1).exp() / lo.sum(1).exp()) ** (1 / length)
    objective = torch.minimum(s * advantages, s.clamp(0.98, 1.03) * advantages)
    close(got, by(student, -(lo.sum(1).exp() * objective).sum()))


@pytest.mark.parametrize("length", [2, 3])
def test_gspo_on_policy_is_the_policy_gradient_over_the_length(length: int) -> None:
    student, _, _ = models()
    advantages = normal(W**length, seed=4)
    (lp,) = rows_of(length, student)
    mask = torch.ones_like(lp, dtype=torch.bool)
    probability = lp.sum(1).detach().exp()
    loss = sequence_surrogate(lp, lp.detach(), advantages, mask).mean(1)
    got = by(student, (probability * loss).sum())
    (lp,) = rows_of(length, student)
    close(got, by(student, -(lp.sum(1).exp() * advantages).sum() / length))
