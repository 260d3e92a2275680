"""Group-relative advantages: goldens, exact zeros and refusals."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.reference import close, f64
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.advantages import group_relative


def test_golden_one_of_four() -> None:
    # mean 1/4, squares 9/16 + 3/16 = 3/4, divided by 4 - 1: std 1/2.
    got = group_relative(f64([[1.0, 0.0, 0.0, 0.0]]), eps=0.0)
    close(got, [[1.5, -0.5, -0.5, -0.5]])


def test_golden_pair_with_eps() -> None:
    # mean 1, std (ddof 1) sqrt(2): 1 / (sqrt(2) + 0.5).
    a = 1 / (math.sqrt(2) + 0.5)
    close(group_relative(f64([[2.0, 0.0]]), eps=0.5), [[a, -a]])


def test_default_eps() -> None:
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    close(group_relative(f64([[1.0, 0.0]])), [[a, -a]])


def test_without_division() -> None:
    close(group_relative(f64([[3.0, 1.0, 2.0]]), scale_by_std=False), [[1.0, -1.0, 0.0]])


def test_rows_are_separate_groups() -> None:
    rows = f64([[1.0, 0.0, 0.0], [5.0, 5.0, 8.0]])
    close(group_relative(rows), torch.cat([group_relative(rows[:1]), group_relative(rows[1:])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.3, 1.0, 0.0, -0.7, 1e8])
@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_equal_rewards_give_exactly_zero(
    dtype: torch.dtype, value: float, scale_by_std: bool, eps: float
) -> None:
    for size in (2, 3, 7, 16):
        got = group_relative(torch.full((1, size), value, dtype=dtype), scale_by_std, eps)
        assert got.eq(0).all()


def test_equal_group_beside_an_unequal_one() -> None:
    got = group_relative(torch.tensor([[0.1] * 3, [1.0, 0.0, 0.0]]))
    assert got[0].eq(0).all()
    assert got[1].ne(0).all()


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.floats(0.0, 1.0))
def test_matches_slow_reference(rewards: list[float], eps: float) -> None:
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    for scale_by_std in (True, False):
        got = group_relative(f64([rewards]), scale_by_std, eps)
        if len(set(rewards)) == 1:
            assert got.eq(0).all()
        elif not scale_by_std:
            close(got, [[r - mean for r in rewards]])
        elif std > 1e-3:  # below it cancellation in the mean shows at 1e-10
            close(got, [[(r - mean) / (std + eps) for r in rewards]])


@pytest.mark.parametrize("rewards", [[[1, 0, 0]], [[True, False, False]]])
def test_integers_and_booleans_give_float32(rewards: list[list[int]]) -> None:
    got = group_relative(torch.tensor(rewards))
    assert got.dtype == torch.float32
    close(got, group_relative(f64(rewards)), 1e-5)  # float32


def test_no_prompts_give_no_advantages() -> None:
    assert group_relative(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (torch.zeros(4), r"`rewards` must have shape \[P, G\]: got \[4\]\. Give one row per"),
        (torch.zeros(2, 2, 2), r"`rewards` must have shape \[P, G\]: got \[2, 2, 2\]"),
        (torch.zeros(3, 1), r"`group_size` must be at least 2 .*: got 1\. Sample more"),
        (torch.zeros(3, 0), r"`group_size` must be at least 2 .*: got 0\."),
        (torch.tensor([[1.0, math.nan]]), r"`rewards` must be finite: got 1 NaN or inf.* of 2\."),
        (torch.tensor([[math.inf, -math.inf]]), r"`rewards` must be finite: got 2 .*Correct the"),
    ],
)
def test_refusals(rewards: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        group_relative(rewards)
