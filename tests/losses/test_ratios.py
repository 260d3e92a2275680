"""The clipped surrogate and TRRD against slow references, and the laws that relate them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from helpers.reference import close, f64, graded, normal, one, surrogate, trrd_ratio
from kdrl_lightning.losses import clipped_surrogate, trrd_log_ratio, trrd_surrogate

LOGP = st.floats(-8.0, -0.001)
CLIP = st.floats(0.05, 0.5)
ADVANTAGE = st.floats(-3.0, 3.0)


def scores(seed: int, rows: int = 6, columns: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs now, at rollout time and of the teacher, and advantages of either sign."""
    old = -normal(rows, columns, seed=seed).abs() - 0.05
    now = old + normal(rows, columns, seed=seed + 1, scale=0.3)
    teacher = old + normal(rows, columns, seed=seed + 2)
    return now, old, teacher, normal(rows, seed=seed + 3)


def loop(now: Tensor, ratio: Any, advantages: Tensor, low: float, high: float) -> tuple[Any, Any]:
    """The slow reference over a table of tokens."""
    values, gradients = torch.zeros_like(now), torch.zeros_like(now)
    for i in range(now.shape[0]):
        for t in range(now.shape[1]):
            a = float(advantages[i] if advantages.dim() == 1 else advantages[i, t])
            values[i, t], gradients[i, t] = surrogate(ratio(i, t), a, low, high)
    return values, gradients


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.3, 0.1), (1.0, math.inf)])
@pytest.mark.parametrize("per_token", [False, True])
def test_clipped_surrogate_matches_slow_reference(low: float, high: float, per_token: bool) -> None:
    now, old, _, advantages = scores(0)
    if per_token:
        advantages = normal(*now.shape, seed=9)
    got = graded(clipped_surrogate, now, old, advantages, low, high)
    expected = loop(
        now, lambda i, t: math.exp(now[i, t]) / math.exp(old[i, t]), advantages, low, high
    )
    close(got[0], expected[0])
    close(got[1], expected[1])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("clamp", [None, 0.5, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28)])
def test_trrd_matches_slow_reference(
    alpha: float, clamp: float | None, low: float, high: float
) -> None:
    now, old, teacher, advantages = scores(10)
    got = graded(trrd_surrogate, now, old, teacher, advantages, alpha, low, high, clamp)
    expected = loop(
        now,
        lambda i, t: trrd_ratio(
            float(now[i, t]), float(old[i, t]), float(teacher[i, t]), alpha, clamp
        ),
        advantages,
        low,
        high,
    )
    close(got[0], expected[0])
    close(got[1], expected[1])


@given(LOGP, LOGP, LOGP, ADVANTAGE, st.floats(0, 1), CLIP, CLIP)
def test_trrd_is_the_papers_formula(
    lp: float, old: float, teacher: float, a: float, alpha: float, low: float, high: float
) -> None:
    ratio = trrd_ratio(lp, old, teacher, alpha)
    assume(min(abs(ratio - 1 + low), abs(ratio - 1 - high)) > 1e-9)
    got = graded(trrd_surrogate, one(lp), one(old), one(teacher), one(a)[0], alpha, low, high, None)
    value, gradient = surrogate(ratio, a, low, high)
    close(got[0], [[value]])
    close(got[1], [[gradient]])


@given(LOGP, LOGP, LOGP, ADVANTAGE, st.floats(0, 1), CLIP, CLIP)
def test_trrd_is_a_weighted_surrogate_with_moved_fences(
    lp: float, old: float, teacher: float, a: float, alpha: float, low: float, high: float
) -> None:
    w = (math.exp(old) / math.exp(teacher)) ** (1 - alpha)
    rho = math.exp(lp - old)
    assume(min(abs(w * rho - 1 + low), abs(w * rho - 1 - high)) > 1e-9)
    value, gradient = surrogate(rho, a, 1 - (1 - low) / w, (1 + high) / w - 1)
    got = graded(trrd_surrogate, one(lp), one(old), one(teacher), one(a)[0], alpha, low, high, None)
    close(got[0], [[w * value]])
    close(got[1], [[w * gradient]])


@given(LOGP, LOGP, LOGP, ADVANTAGE, st.floats(0, 1))
def test_teacher_never_flips_the_sign(
    lp: float, old: float, teacher: float, a: float, alpha: float
) -> None:
    _, gradient = graded(
        trrd_surrogate, one(lp), one(old), one(teacher), one(a)[0], alpha, offset_clamp=None
    )
    assert gradient.item() * a <= 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clamp", [None, 1.0])
def test_alpha_one_is_grpo_bit_for_bit(dtype: torch.dtype, clamp: float | None) -> None:
    now, old, teacher, advantages = (x.to(dtype) for x in scores(20))
    got = graded(trrd_surrogate, now, old, teacher, advantages, 1.0, 0.2, 0.28, clamp)
    expected = graded(clipped_surrogate, now, old, advantages, 0.2, 0.28)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_teacher_equal_to_old_is_grpo_also_off_policy(alpha: float) -> None:
    now, old, _, advantages = scores(30)
    assert (now != old).all()
    got = graded(trrd_surrogate, now, old, old, advantages, alpha)
    expected = graded(clipped_surrogate, now, old, advantages)
    close(got[0], expected[0])
    close(got[1], expected[1])


def test_zero_advantage_gives_zero_gradient() -> None:
    now, old, teacher, advantages = scores(40)
    zero = torch.zeros_like(advantages)
    for loss, gradient in (
        graded(trrd_surrogate, now, old, teacher, zero, offset_clamp=None),
        graded(clipped_surrogate, now, old, zero),
    ):
        assert (loss == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("old_over_teacher", "advantage", "alive"),
    [
        (1.43, 1.0, True),  # (1 + .2)^(1 / (1 - .5)) = 1.44
        (1.45, 1.0, False),
        (0.65, -1.0, True),  # (1 - .2)^2 = 0.64
        (0.63, -1.0, False),
        (0.63, 1.0, True),
        (1.45, -1.0, True),
    ],
)
def test_dead_zone_edges(old_over_teacher: float, advantage: float, alive: bool) -> None:
    old = one(-0.5)
    teacher = old - math.log(old_over_teacher)
    _, gradient = graded(trrd_surrogate, old, old, teacher, f64([advantage]))
    # At rho = 1 a token that lives has its full weight w = (pi_old / pi_T)^(1/2).
    close(gradient, [[-advantage * old_over_teacher**0.5 if alive else 0.0]])


@pytest.mark.parametrize(
    ("low", "high", "ratio", "advantage", "alive"),
    [
        (0.2, 0.4, 1.3, 1.0, True),
        (0.2, 0.4, 1.5, 1.0, False),
        (0.2, 0.4, 0.7, -1.0, False),
        (0.4, 0.2, 0.7, -1.0, True),
        (0.4, 0.2, 0.5, -1.0, False),
        (0.4, 0.2, 1.3, 1.0, False),
        (0.2, 0.4, 3.0, -1.0, True),
        (0.2, 0.4, 0.1, 1.0, True),
    ],
)
def test_asymmetric_clip(
    low: float, high: float, ratio: float, advantage: float, alive: bool
) -> None:
    a = f64([advantage])
    loss, gradient = graded(clipped_surrogate, one(math.log(ratio)), one(0.0), a, low, high)
    fence = 1 + high if advantage > 0 else 1 - low
    close(loss, [[-advantage * (ratio if alive else fence)]])
    close(gradient, [[-advantage * ratio if alive else 0.0]])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("far", [3.0, -3.0])
def test_clamped_offset_keeps_the_full_gradient_weight(alpha: float, far: float) -> None:
    old = one(-4.0)
    teacher = old - far
    leaf = (old + 0.1).requires_grad_()
    log_ratio = trrd_log_ratio(leaf, old, teacher, alpha, 1.0)
    close(log_ratio, [[0.1 + (1 - alpha) * math.copysign(1.0, far)]])
    (gradient,) = torch.autograd.grad(log_ratio.sum(), leaf)
    close(gradient, [[1.0]])


def test_clamp_acts_on_the_offset_not_on_the_student_gap() -> None:
    # o = .8 is inside the clamp, lp - lp_T = 1.3 is not; nothing may be cut.
    log_ratio = trrd_log_ratio(one(-1.0), one(-1.5), one(-2.3), 0.5, 1.0)
    close(log_ratio, [[0.5 * 0.5 + 0.5 * 1.3]])
    # o = 3 is cut to 1, though lp - lp_T = .5 would be inside.
    log_ratio = trrd_log_ratio(one(-5.0), one(-2.5), one(-5.5), 0.5, 1.0)
    close(log_ratio, [[-2.5 + 0.5 * 1.0]])


def test_defaults_are_the_contracts() -> None:
    now, old, teacher, advantages = scores(50)
    spelled = trrd_surrogate(now, old, teacher, advantages, 0.5, 0.2, 0.2, None, None, None)
    assert torch.equal(trrd_surrogate(now, old, teacher, advantages), spelled)
    assert torch.equal(
        clipped_surrogate(now, old, advantages), clipped_surrogate(now, old, advantages, 0.2, 0.2)
    )
    spelled = trrd_log_ratio(now, old, teacher, 0.5, None, None)
    assert torch.equal(trrd_log_ratio(now, old, teacher), spelled)


def test_advantages_per_completion_equal_advantages_per_token() -> None:
    now, old, teacher, advantages = scores(60)
    spread = advantages[:, None].expand_as(now)
    assert torch.equal(
        trrd_surrogate(now, old, teacher, advantages), trrd_surrogate(now, old, teacher, spread)
    )


def test_square_tables_spread_advantages_over_rows() -> None:
    now, old, _, advantages = scores(70, 3, 3)
    loss = clipped_surrogate(now, old, advantages)
    for i in range(3):
        close(loss[i], clipped_surrogate(now[i : i + 1], old[i : i + 1], advantages[i : i + 1])[0])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_only_the_student_gets_gradient(alpha: float) -> None:
    now, old, teacher, advantages = (x.requires_grad_() for x in scores(80))
    loss = trrd_surrogate(now, old, teacher, advantages, alpha)
    (loss + clipped_surrogate(now, old, advantages)).sum().backward()
    assert now.grad is not None
    assert old.grad is None
    assert teacher.grad is None
    assert advantages.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "value"),
    [(1000.0, 2.0, -2.4), (1000.0, 0.0, 0.0), (-1000.0, -2.0, 1.6), (-1000.0, 0.0, 0.0)],
)
def test_a_fenced_ratio_cannot_overflow(
    dtype: torch.dtype, log_ratio: float, advantage: float, value: float
) -> None:
    a = torch.tensor([advantage], dtype=dtype)
    old = torch.zeros(1, 1, dtype=dtype)
    now, teacher = old + log_ratio, old - log_ratio
    for got in (
        graded(clipped_surrogate, now, old, a),
        graded(trrd_surrogate, old, old, teacher, a, trrd_alpha=0.0, offset_clamp=None),
    ):
        close(got[0], [[value]], 1e-6)  # float32
        assert got[1].item() == 0.0


def test_first_update_is_the_plain_policy_gradient() -> None:
    now, _, _, advantages = scores(90)
    loss, gradient = graded(clipped_surrogate, now, now, advantages)
    close(loss, -advantages[:, None].expand_as(now))
    close(gradient, -advantages[:, None].expand_as(now))
