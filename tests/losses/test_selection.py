"""Selections, engine corrections and advantages shaped by the teacher, by hand and by law."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers.reference import close, f64, normal
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses import (
    aligned,
    beneficial,
    certain,
    importance_mask,
    importance_weights,
    wrong_completions,
    wrong_groups,
)
from kdrl_lightning.losses.advantages import group_relative, reweighted, shaped

INF, NAN = math.inf, math.nan


def test_wrong_completions_and_groups() -> None:
    correct = torch.tensor([True, False, False, False, True, True])
    groups = torch.tensor([4, 0, 4, 0, 2, 2])
    assert wrong_completions(correct).tolist() == [False, True, True, True, False, False]
    assert wrong_groups(correct, groups).tolist() == [False, True, False, True, False, False]


def test_no_completions_make_no_wrong_groups() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    assert wrong_groups(empty.bool(), empty).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12))
def test_a_group_is_wrong_if_all_its_completions_are(rows: list[tuple[int, bool]]) -> None:
    groups = torch.tensor([g for g, _ in rows])
    correct = torch.tensor([c for _, c in rows])
    expected = [not any(c for h, c in rows if h == g) for g, _ in rows]
    assert wrong_groups(correct, groups).tolist() == expected


def test_aligned_by_token_and_by_completion() -> None:
    old = f64([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    teacher = old + f64([[0.5, -0.5, -1.1], [0.0, 2.0, NAN]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    by_token = [[True, True, False], [True, False, False]]
    assert aligned(old, teacher, mask, 0.5).tolist() == by_token
    # Means .7 and 1.
    assert aligned(old, teacher, mask, 0.71, True).tolist() == [[True] * 3, [False] * 3]
    assert aligned(old, teacher, mask, 1.0, True).tolist() == mask.tolist()
    assert aligned(old, teacher, mask & False, 9.0, True).tolist() == [[False] * 3] * 2


def test_thresholds_are_reached_by_equals() -> None:
    values = f64([-0.5, 0.0, 0.5])
    assert beneficial(values, 0.0).tolist() == [False, True, True]
    assert certain(values, 0.0).tolist() == [True, True, False]


# --- Engine weights ---


@given(st.floats(-8, 0), st.floats(-8, 0), st.floats(1.0, 4.0))
def test_importance_weights_are_truncated_ratios(old: float, mu: float, cap: float) -> None:
    got = importance_weights(f64([[old]]), f64([[mu]]), cap)
    close(got, [[min(math.exp(old) / math.exp(mu), cap)]])


def test_importance_weights_by_hand() -> None:
    old, mu = f64([[0.5, 0.5, 0.2, 0.0]]).log(), f64([[0.5, 0.1, 0.8, 0.5]]).log()
    close(importance_weights(old, mu), [[1.0, 2.0, 0.25, 0.0]])  # the default cap is 2
    close(importance_weights(old, mu, 6.0), [[1.0, 5.0, 0.25, 0.0]])


def test_importance_mask_keeps_both_edges() -> None:
    old = f64([[0.499, 0.5, 1.0, 2.0, 2.001]]).log()
    mu = torch.zeros_like(old)
    assert importance_mask(old, mu).tolist() == [[False, True, True, True, False]]
    assert importance_mask(old, mu, 0.9, 1.1).tolist() == [[False, False, True, False, False]]
    assert not importance_mask(f64([[NAN, INF, -INF]]), f64([[0.0] * 3])).any()


def test_importance_weights_have_no_gradient() -> None:
    old = normal(2, 3, seed=1).requires_grad_()
    mu = normal(2, 3, seed=2).requires_grad_()
    assert not importance_weights(old, mu).requires_grad
    assert not importance_mask(old, mu).requires_grad


# --- Shaped advantages ---

GROUP = st.lists(st.tuples(st.floats(-2, 2), st.floats(-3, 3)), min_size=2, max_size=6)


@given(GROUP, st.floats(0.0, 2.0))
def test_shaped_matches_slow_reference(rows: list[tuple[float, float]], beta: float) -> None:
    rewards, gaps = ([x[i] for x in rows] for i in (0, 1))
    std = statistics.stdev(rewards)
    total = [r + beta * g for r, g in zip(rewards, gaps, strict=True)]
    centred = [x - statistics.fmean(total) for x in total]
    args = f64([rewards]), f64([gaps]), beta
    close(shaped(*args, scale_by_std=False), [centred])
    if len(set(rewards)) == 1:
        close(shaped(*args), [centred])
    elif std > 1e-3:  # below it cancellation in the mean shows at 1e-10
        close(shaped(*args), [[x / (std + 1e-6) for x in centred]])
        close(shaped(*args, eps=0.5), [[x / (std + 0.5) for x in centred]])


def test_shaped_by_hand() -> None:
    # Rewards (1, 0): std sqrt(1/2). Gaps (2, 0), centred (1, -1), times .1.
    got = shaped(f64([[1.0, 0.0]]), f64([[2.0, 0.0]]), 0.1, eps=0.0)
    close(got, [[0.6 * math.sqrt(2), -0.6 * math.sqrt(2)]])
    # Equal rewards: the gap itself, not divided by anything.
    got = shaped(f64([[1.0, 1.0]]), f64([[2.0, 0.0]]), 0.1)
    close(got, [[0.1, -0.1]])


@given(GROUP)
def test_shaped_without_coefficient_is_group_relative(rows: list[tuple[float, float]]) -> None:
    rewards, gaps = (f64([[x[i] for x in rows]]) for i in (0, 1))
    for scale in (True, False):
        assert torch.equal(shaped(rewards, gaps, 0.0, scale), group_relative(rewards, scale))


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-3, 3), st.booleans()), min_size=2, max_size=6),
    st.floats(0.0, 2.0),
)
def test_shaped_leaves_completions_without_a_gap_alone(
    rows: list[tuple[float, float, bool]], beta: float
) -> None:
    rewards, gaps = f64([[r for r, _, _ in rows]]), f64([[g for _, g, _ in rows]])
    has = torch.tensor([[h for _, _, h in rows]])
    plain = group_relative(rewards, scale_by_std=False)[0].tolist()
    known = [g for _, g, h in rows if h]
    centre = sum(known) / max(len(known), 1)
    expected = [p + beta * (g - centre) * h for p, (_, g, h) in zip(plain, rows, strict=True)]
    close(shaped(rewards, gaps, beta, scale_by_std=False, has_gap=has), [expected])
    for scale in (True, False):
        found = shaped(rewards, gaps, beta, scale, has_gap=has)
        assert torch.equal(found[~has], shaped(rewards, gaps, 0.0, scale)[~has])
        # What the teacher says of nobody is not read.
        other = shaped(rewards, torch.where(has, gaps, torch.nan), beta, scale, has_gap=has)
        assert torch.equal(found, other)


def test_shaped_groups_are_separate_and_checked() -> None:
    rewards, gaps = f64([[1.0, 0.0], [0.3, 0.3]]), f64([[0.5, 0.1], [2.0, -1.0]])
    rows = [shaped(rewards[i : i + 1], gaps[i : i + 1], 0.2) for i in (0, 1)]
    close(shaped(rewards, gaps, 0.2), torch.cat(rows))
    assert shaped(f64(torch.zeros(0, 2)), f64(torch.zeros(0, 2)), 0.2).shape == (0, 2)
    with pytest.raises(ConfigurationError, match=r"`group_size` must be at least 2"):
        shaped(f64([[1.0]]), f64([[1.0]]), 0.2)
    with pytest.raises(ConfigurationError, match=r"`rewards` must be finite: got 1 NaN"):
        shaped(f64([[1.0, NAN]]), f64([[1.0, 1.0]]), 0.2)


# --- Reweighted advantages ---

UNIT = st.floats(0.0, 1.0)


@given(st.floats(-3, 3), st.floats(-20, 20), UNIT, UNIT)
def test_reweighted_matches_slow_reference(a: float, d: float, mix: float, width: float) -> None:
    sign = (a > 0) - (a < 0)
    weight = min(max(math.exp(sign * d), 1 - width), 1 + width)
    got = reweighted(f64([[a]]), f64([[d]]), mix, width)
    close(got, [[a * ((1 - mix) + mix * weight)]])
    assert got.item() * a >= 0.0  # never flipped
    assert abs(got.item()) <= abs(a) * (1 + mix * width) + 1e-12


@pytest.mark.parametrize(
    ("a", "d", "expected"),
    [
        (2.0, 0.1, 2.0 * (0.5 + 0.5 * math.exp(0.1))),
        (2.0, 9.0, 2.0 * 1.1),  # liked and rewarded: more, up to .5 x 1.2
        (2.0, -9.0, 2.0 * 0.9),
        (-2.0, -9.0, -2.0 * 1.1),  # disliked and punished: more
        (-2.0, 9.0, -2.0 * 0.9),
        (0.0, 9.0, 0.0),
        (1.0, 0.0, 1.0),
        (1.0, INF, 1.1),
        (-1.0, INF, -0.9),
    ],
)
def test_reweighted_by_hand(a: float, d: float, expected: float) -> None:
    close(reweighted(f64([[a]]), f64([[d]])), [[expected]])


@given(st.floats(0.01, 3), st.floats(-3, 3))
def test_reweighted_without_mix_or_width_is_the_advantage(a: float, d: float) -> None:
    assume(a)
    for mix, width in ((0.0, 0.7), (0.7, 0.0)):
        close(reweighted(f64([[a]]), f64([[d]]), mix, width), [[a]])


@pytest.mark.parametrize("d", [INF, -INF])
def test_reweighted_of_no_advantage_is_none(d: float) -> None:
    close(reweighted(f64([[0.0]]), f64([[d]])), [[0.0]])
