"""TRRD as in RLAD's paper: the clamp of App. B, the regimes of section 4.1, App. C."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from helpers.reference import close, f64, graded, log_softmax, normal, one, published_trrd
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses import clipped_surrogate, trrd_log_ratio, trrd_surrogate

V = 5
LOGP = st.floats(-6.0, -0.001)
ALPHA = st.floats(0.0, 0.95)
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def published(
    logprobs: Tensor, old: Tensor, teacher: Tensor, advantages: Tensor, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Loss and gradient with the paper's clip and clamp."""
    return graded(
        trrd_surrogate,
        *(logprobs, old, teacher, advantages, alpha),
        **CLIP,
        offset_clamp=None,
        log_ratio_clamp=1.0,
    )


@given(LOGP, LOGP, LOGP, st.floats(-3.0, 3.0), st.floats(0.0, 1.0))
def test_the_papers_clamp_matches_a_slow_reference(
    lp: float, old: float, teacher: float, a: float, alpha: float
) -> None:
    ratio, slope = published_trrd(lp, old, teacher, alpha, 1.0) if alpha < 1 else (0.0, 1.0)
    if alpha == 1.0:
        ratio = math.exp(lp - old)
    assume(min(abs(ratio - 0.8), abs(ratio - 1.28), abs(abs(lp - teacher) - 1)) > 1e-9)
    fenced = (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)
    value = min(max(ratio, 0.8), 1.28) if fenced else ratio
    got = published(one(lp), one(old), one(teacher), f64([a]), alpha)
    close(got[0], [[-a * value]])
    close(got[1], [[0.0 if fenced else -a * ratio * slope]])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clamp", ["offset", "log_ratio"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_expected_gradient_by_enumeration(seed: int, clamp: str, alpha: float) -> None:
    """Sum over a vocabulary what each clamp teaches; every token has its own advantage."""
    logits = normal(V, seed=seed).requires_grad_()
    old = (logits.detach() + normal(V, seed=seed + 10, scale=0.2)).log_softmax(-1)
    teacher = (5.0 * normal(V, seed=seed + 20)).log_softmax(-1)
    advantages = normal(V, seed=seed + 30)
    lp = logits.log_softmax(-1)
    clamps = {"offset_clamp": None, "log_ratio_clamp": None} | {f"{clamp}_clamp": 1.0}
    loss = trrd_surrogate(lp, old, teacher, advantages, alpha, **CLIP, **clamps)
    (got,) = torch.autograd.grad((old.exp() * loss).sum(), logits)

    log_p, slopes = log_softmax(logits.tolist()), []
    for v in range(V):
        q, t, a = old[v].item(), teacher[v].item(), advantages[v].item()
        if clamp == "offset":
            bounded = q - min(max(q - t, -1.0), 1.0)
            ratio, slope = published_trrd(log_p[v], q, bounded, alpha, math.inf)
        else:
            ratio, slope = published_trrd(log_p[v], q, t, alpha, 1.0)
        fenced = (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)
        slopes.append(0.0 if fenced else -math.exp(q) * a * ratio * slope)
    # d log p_v / d logit_j = [v = j] - p_j
    expected = [slopes[j] - math.exp(log_p[j]) * sum(slopes) for j in range(V)]
    assert any(abs(old - teacher) > 1.0)
    close(got, expected)


@pytest.mark.parametrize("alpha", [0.25, 0.5])
@pytest.mark.parametrize("a", [0.7, -0.7])
def test_where_the_two_clamps_differ(alpha: float, a: float) -> None:
    """At rho = 1 they agree in value; a clamped token keeps the weight alpha in the paper's."""
    old, advantage = one(-1.0), f64([a])
    teacher = old + 3.0 if a > 0 else old - 3.0  # a clamped token whose gradient is alive
    ours = graded(trrd_surrogate, old, old, teacher, advantage, alpha, **CLIP, offset_clamp=1.0)
    theirs = published(old, old, teacher, advantage, alpha)
    close(ours[0], theirs[0])
    assert ours[1].item() != 0.0
    close(theirs[1], alpha * ours[1])
    # Within the clamp the two are one, also off policy.
    now, near = one(-0.9), one(-1.3)
    ours = graded(trrd_surrogate, now, old, near, advantage, alpha, **CLIP, offset_clamp=1.0)
    theirs = published(now, old, near, advantage, alpha)
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])


def test_the_papers_clamp_follows_the_current_student() -> None:
    # lp - lp_T = 1.3 is clamped although the old student was within the bound, and vice versa.
    clamp = {"offset_clamp": None, "log_ratio_clamp": 1.0}
    close(trrd_log_ratio(one(-1.0), one(-1.5), one(-2.3), 0.5, **clamp), [[0.25 + 0.5 * 1.0]])
    close(trrd_log_ratio(one(-5.0), one(-2.5), one(-5.5), 0.5, **clamp), [[-1.25 + 0.5 * 0.5]])


def test_alpha_zero_and_a_clamped_token_have_no_gradient() -> None:
    _, gradient = published(one(-1.0), one(-1.0), one(-4.0), f64([-1.0]), 0.0)
    assert gradient.item() == 0.0


@pytest.mark.parametrize("alpha", [1.0, torch.ones(6, 7, dtype=torch.float64)])
def test_alpha_one_is_grpo_with_the_papers_clamp(alpha: float | Tensor) -> None:
    old = -normal(6, 7, seed=1).abs()
    now, teacher = old + 2.0 * normal(6, 7, seed=2), old + 3.0 * normal(6, 7, seed=3)
    advantages = normal(6, seed=4)
    expected = graded(clipped_surrogate, now, old, advantages, 0.2, 0.28)
    got = published(now, old, teacher, advantages, alpha)  # type: ignore[arg-type]
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_a_teacher_that_excludes_a_token_is_clamped() -> None:
    loss, gradient = published(one(-1.0), one(-1.0), one(-math.inf), f64([-1.0]))
    close(loss, [[math.exp(0.5)]])
    close(gradient, [[0.5 * math.exp(0.5)]])


def test_two_clamps_are_refused() -> None:
    words = (
        "`log_ratio_clamp` must not be set with an `offset_clamp` of 1.0: got 2.0. "
        "Leave `offset_clamp` out for the paper's clamp."
    )
    with pytest.raises(ConfigurationError) as caught:
        trrd_log_ratio(one(0.0), one(0.0), one(0.0), 0.5, 1.0, 2.0)
    assert str(caught.value) == words


def bare(lp: float, old: float, teacher: float, a: float, alpha: float) -> float:
    """Gradient by log pi without a clamp."""
    arguments = one(lp), one(old), one(teacher), f64([a]), alpha
    return float(graded(trrd_surrogate, *arguments, **CLIP, offset_clamp=None)[1])


@given(LOGP, LOGP, ALPHA, st.floats(0.1, 3.0))
def test_regime_1_a_rewarded_token_rises_until_the_anchor_times_1_plus_epsilon(
    old: float, teacher: float, alpha: float, a: float
) -> None:
    """Section 4.1: the more probable the teacher finds it, the later the clip is reached."""
    edge = alpha * old + (1 - alpha) * teacher + math.log(1.28)
    for shift in (-0.5, -1e-6):
        assert bare(edge + shift, old, teacher, a, alpha) < 0.0  # descent raises log pi
    assert bare(edge + 1e-6, old, teacher, a, alpha) == 0.0
    # A teacher that likes it more by 0.1 moves the edge up by (1 - alpha) 0.1.
    assert bare(edge + 0.09 * (1 - alpha), old, teacher + 0.1, a, alpha) < 0.0


@given(LOGP, LOGP, ALPHA, st.floats(-3.0, -0.1))
def test_regime_2_a_punished_token_falls_until_the_anchor_times_1_minus_epsilon(
    old: float, teacher: float, alpha: float, a: float
) -> None:
    """Section 4.1: a teacher that likes the token protects it; one that does not lets it fall."""
    edge = alpha * old + (1 - alpha) * teacher + math.log(0.8)
    for shift in (0.5, 1e-6):
        assert bare(edge + shift, old, teacher, a, alpha) > 0.0  # descent lowers log pi
    assert bare(edge - 1e-6, old, teacher, a, alpha) == 0.0
    assert bare(edge - 0.09 * (1 - alpha), old, teacher - 0.1, a, alpha) > 0.0


@given(LOGP, LOGP, LOGP, ALPHA, st.floats(-1.0, 1.0))
def test_regime_3_near_a_zero_advantage_the_teacher_does_nothing(
    lp: float, old: float, teacher: float, alpha: float, a: float
) -> None:
    """Section 4.1: the gradient shrinks in proportion to the advantage, whatever the teacher."""
    whole, tiny = (bare(lp, old, teacher, x, alpha) for x in (a, 1e-3 * a))
    close(tiny, 1e-3 * whole)
    assert bare(lp, old, teacher, 0.0, alpha) == 0.0


@given(LOGP, LOGP, LOGP, st.floats(0.0, 1.0))
def test_alpha_interpolates_the_logarithm_of_the_gradient_linearly(
    lp: float, old: float, teacher: float, alpha: float
) -> None:
    """App. C, unclipped: from GRPO's ratio at alpha = 1 to pi / pi_T at alpha = 0."""

    def weight(at: float) -> float:
        leaf = one(lp).requires_grad_()
        ratio = trrd_log_ratio(leaf, one(old), one(teacher), at, None).exp()
        return math.log(torch.autograd.grad(ratio.sum(), leaf)[0].item())

    close(weight(0.0), lp - teacher)
    close(weight(1.0), lp - old)
    close(weight(alpha), alpha * weight(1.0) + (1 - alpha) * weight(0.0), 1e-9)
    # The limit is reached continuously.
    close(weight(1e-9), weight(0.0), 1e-7)


@given(st.lists(LOGP, min_size=4, max_size=4), st.floats(0.1, 2.0))
def test_at_alpha_zero_a_pair_has_dpos_logit(values: list[float], a: float) -> None:
    """App. C: with advantages a and -a, sum A log r is a times DPO's difference of gaps."""
    lp, teacher = f64([values[:2]]), f64([values[2:]])
    log_ratio = trrd_log_ratio(lp, lp - 0.3, teacher, 0.0, None)
    logit = (lp[0, 0] - lp[0, 1]) - (teacher[0, 0] - teacher[0, 1])
    close((f64([a, -a]) * log_ratio).sum(), a * logit)
    # It is the first order of the ratio's surrogate: r - 1 = log r + O(log^2 r).
    near = trrd_log_ratio(lp, lp, lp + 1e-4 * (teacher - lp), 0.0, None)
    close(near.exp() - 1.0, near, 1e-6)
