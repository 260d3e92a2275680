"""Dual clip, sequence ratio, CISPO and LUFFY's shaping against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from helpers.reference import close, f64, graded, normal, one, surrogate, trrd_ratio
from kdrl_lightning.losses import (
    cispo_surrogate,
    clipped_surrogate,
    luffy_surrogate,
    sequence_log_ratio,
    sequence_surrogate,
    trrd_surrogate,
)

LOGP = st.floats(-8.0, -0.001)
ADVANTAGE = st.floats(-3.0, 3.0)


def scores(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs now and at rollout time, advantages, and a mask with an empty row."""
    old = -normal(6, 5, seed=seed).abs() - 0.05
    now = old + normal(6, 5, seed=seed + 1, scale=0.3)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 0, 4, 2])[:, None]
    return now, old, normal(6, seed=seed + 2), mask


# --- The surrogate itself ---


@given(LOGP, LOGP, ADVANTAGE, st.floats(0.0, 0.9), st.floats(0.0, 3.0))
def test_the_surrogate_is_the_worse_of_two_and_dead_where_the_clip_wins(
    lp: float, old: float, a: float, low: float, high: float
) -> None:
    ratio = math.exp(lp - old)
    assume(min(abs(ratio - 1 + low), abs(ratio - 1 - high)) > 1e-9)
    loss, gradient = graded(clipped_surrogate, one(lp), one(old), f64([a]), low, high)
    clipped = min(max(ratio, 1 - low), 1 + high)
    close(loss, [[-min(ratio * a, clipped * a)]])
    close(gradient, [[-ratio * a if ratio * a <= clipped * a else 0.0]])


# --- Dual clip ---


@given(LOGP, LOGP, ADVANTAGE, st.floats(1.05, 5.0))
def test_dual_clip_bounds_the_loss_of_punished_tokens(
    lp: float, old: float, a: float, dual: float
) -> None:
    """Arxiv 1912.09729, Eq. 5: max(min(r A, clip(r) A), c A) where A < 0."""
    ratio = math.exp(lp - old)
    assume(min(abs(ratio - dual), abs(ratio - 0.8), abs(ratio - 1.2)) > 1e-9)
    objective = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
    bounded = max(objective, dual * a) if a < 0 else objective
    loss, gradient = graded(clipped_surrogate, one(lp), one(old), f64([a]), dual_clip=dual)
    close(loss, [[-bounded]])
    close(gradient, [[0.0 if bounded != objective else surrogate(ratio, a, 0.2, 0.2)[1]]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (2.9, -1.0, 2.9, 2.9),
        (3.1, -1.0, 3.0, 0.0),
        (3.1, 1.0, -1.2, 0.0),  # the ordinary fence, not the dual one
        (0.7, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),
        (9.0, 0.0, 0.0, 0.0),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    got = graded(clipped_surrogate, one(math.log(ratio)), one(0.0), f64([advantage]), dual_clip=3.0)
    close(got[0], [[loss]])
    close(got[1], [[slope]])


@given(LOGP, LOGP, LOGP, ADVANTAGE)
def test_dual_clip_of_trrd_acts_on_its_own_ratio(
    lp: float, old: float, teacher: float, a: float
) -> None:
    ratio = trrd_ratio(lp, old, teacher, 0.5, 1.0)
    assume(min(abs(ratio - 1.5), abs(ratio - 0.8), abs(ratio - 1.2)) > 1e-9)
    args = one(lp), one(old), one(teacher), f64([a])
    loss, gradient = graded(trrd_surrogate, *args, dual_clip=1.5, offset_clamp=1.0)
    value, slope = (-1.5 * a, 0.0) if a < 0 and ratio > 1.5 else surrogate(ratio, a, 0.2, 0.2)
    close(loss, [[value]])
    close(gradient, [[slope]])


def test_a_far_dual_clip_changes_nothing() -> None:
    now, old, advantages, _ = scores(0)
    a = graded(clipped_surrogate, now, old, advantages, dual_clip=1e6)
    b = graded(clipped_surrogate, now, old, advantages)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("log_ratio", [1000.0, math.inf])
def test_dual_clip_cannot_overflow(log_ratio: float) -> None:
    loss, gradient = graded(clipped_surrogate, one(log_ratio), one(0.0), f64([-2.0]), dual_clip=3.0)
    close(loss, [[6.0]])
    assert gradient.item() == 0.0


# --- GSPO ---


@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.1, 0.3)])
def test_sequence_surrogate_is_the_papers(low: float, high: float) -> None:
    now, old, advantages, mask = scores(10)
    loss, gradient = graded(sequence_surrogate, now, old, advantages, mask, low, high)
    for i in range(6):
        n = int(mask[i].sum())
        a = float(advantages[i])
        likelihoods = (math.exp(float(x[i, :n].sum())) for x in (now, old))
        s = (next(likelihoods) / next(likelihoods)) ** (1 / n) if n else 1.0
        value, slope = surrogate(s, a, low, high)
        close(loss[i], [value] * 5)
        # n tokens carry the loss and each log-prob enters s with weight 1 / n: the slope of s.
        close(gradient[i, :n], [slope] * n)


@given(st.lists(st.tuples(LOGP, LOGP), min_size=1, max_size=5), ADVANTAGE)
def test_a_completions_ratio_is_that_of_its_likelihoods_per_token(
    pairs: list[tuple[float, float]], a: float
) -> None:
    now, old = (f64([list(column)]) for column in zip(*pairs, strict=True))
    s = math.exp((now - old).mean().item())
    assume(min(abs(s - 0.9), abs(s - 1.2)) > 1e-9)
    mask = torch.ones_like(now, dtype=torch.bool)
    loss, gradient = graded(sequence_surrogate, now, old, f64([a]), mask, 0.1, 0.2)
    value, slope = surrogate(s, a, 0.1, 0.2)
    close(loss, [[value] * len(pairs)])
    close(gradient, [[slope] * len(pairs)])


def test_advantages_per_token_stay_with_their_token() -> None:
    now, old, _, mask = scores(11)
    advantages = normal(6, 5, seed=40)
    old = now.detach().clone()
    _, gradient = graded(sequence_surrogate, now, old, advantages, mask)
    close(gradient, -advantages)  # at ratio 1 nothing is clipped


def test_sequence_ratio_is_one_value_per_row() -> None:
    now, old, _, mask = scores(20)
    ratio = sequence_log_ratio(now, old, mask)
    for i in range(6):
        n = int(mask[i].sum())
        mean = sum(float(now[i, t] - old[i, t]) for t in range(n)) / max(n, 1)
        close(ratio[i], [mean] * 5)
    leaf, then = now.clone().requires_grad_(), old.clone().requires_grad_()
    sequence_log_ratio(leaf, then, mask).sum().backward()
    assert leaf.grad is not None and then.grad is None


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_sequence_ratio_ignores_what_lies_outside_the_mask(garbage: float) -> None:
    now, old, advantages, mask = scores(30)
    spoilt = old.masked_fill(~mask, garbage)
    got = graded(sequence_surrogate, now, spoilt, advantages, mask)
    expected = graded(sequence_surrogate, now, old, advantages, mask)
    close(got[0], expected[0])
    close(got[1], expected[1])


def test_sequence_surrogate_of_single_tokens_is_the_clipped_one() -> None:
    now, old, advantages, _ = scores(40)
    now, old = now[:, :1], old[:, :1]
    mask = torch.ones_like(now, dtype=torch.bool)
    a = graded(sequence_surrogate, now, old, advantages, mask, 0.2, 0.2)
    b = graded(clipped_surrogate, now, old, advantages)
    close(a[0], b[0])
    close(a[1], b[1])


# --- CISPO ---


@given(LOGP, LOGP, ADVANTAGE, st.floats(0.0, 2.0))
def test_cispo_is_a_weighted_policy_gradient(lp: float, old: float, a: float, high: float) -> None:
    weight = min(math.exp(lp) / math.exp(old), 1 + high)
    loss, gradient = graded(cispo_surrogate, one(lp), one(old), f64([a]), high)
    close(loss, [[-weight * a * lp]])
    close(gradient, [[-weight * a]])


def test_cispo_clips_on_one_side_and_never_dies() -> None:
    old = torch.zeros(1, 4, dtype=torch.float64)
    now = f64([[0.01, 0.5, 1.28, 50.0]]).log()
    for a in (1.0, -1.0):
        _, gradient = graded(cispo_surrogate, now, old, f64([a]))
        close(gradient, [[-0.01 * a, -0.5 * a, -1.28 * a, -1.28 * a]])
    # The default is 0.28, and the weight cannot overflow.
    close(graded(cispo_surrogate, one(1e4), one(0.0), f64([1.0]))[1], [[-1.28]])


# --- LUFFY ---


@given(LOGP, ADVANTAGE, st.floats(0.01, 2.0))
def test_luffy_shapes_the_probability(lp: float, a: float, gamma: float) -> None:
    p = math.exp(lp)
    loss, gradient = graded(luffy_surrogate, one(lp), f64([a]), gamma)
    close(loss, [[-a * p / (p + gamma)]])
    close(gradient, [[-a * p * gamma / (p + gamma) ** 2]])


def test_luffy_lifts_improbable_tokens() -> None:
    # At gamma .1 the weight of log pi is .1 p / (p + .1)^2: .25 at p = .1, .0083 at .99.
    _, gradient = graded(luffy_surrogate, f64([[0.1, 0.99, 1e-3]]).log(), f64([1.0]))
    close(gradient, [[-0.25, -0.099 / 1.09**2, -1e-4 / 0.101**2]])


@pytest.mark.parametrize("lp", [-1e4, -math.inf])
def test_luffy_does_not_underflow(lp: float) -> None:
    loss, gradient = graded(luffy_surrogate, one(lp), f64([-2.0]))
    assert loss.item() == 0.0
    assert gradient.item() == 0.0


# --- What all share ---


@pytest.mark.parametrize("name", ["sequence", "cispo", "luffy", "dual"])
def test_only_the_student_gets_gradient_and_advantages_spread(name: str) -> None:
    now, old, advantages, mask = scores(50)
    leaves = [x.clone().requires_grad_() for x in (now, old, advantages)]
    call: dict[str, Any] = {
        "sequence": lambda n, o, a: sequence_surrogate(n, o, a, mask),
        "cispo": cispo_surrogate,
        "luffy": lambda n, o, a: luffy_surrogate(n, a),
        "dual": lambda n, o, a: clipped_surrogate(n, o, a, dual_clip=1.1),
    }
    loss = call[name](*leaves)
    gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    assert gradients[0] is not None and gradients[0].ne(0).any()
    assert gradients[1] is None and gradients[2] is None
    spread = advantages[:, None].expand_as(now)
    assert torch.equal(loss, call[name](now, old, spread))
    zero = call[name](leaves[0], old, torch.zeros_like(advantages))
    assert torch.autograd.grad(zero.sum(), leaves[0])[0].eq(0).all()
