"""A step's statistics over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from kdrl_lightning.metrics import StepStats


def masks(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def test_a_mean_is_weighted_over_all_micro_batches():
    stats = StepStats()
    stats.add_mean("a", torch.tensor([1.0, 2.0, 3.0]), masks(1, 1, 0))
    stats.add_mean("a", torch.tensor([9.0]), masks(1))
    assert stats.compute() == {"a": 4.0}


def test_a_mean_without_mask_takes_all_values():
    stats = StepStats()
    stats.add_mean("a", torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert stats.compute() == {"a": 3.0}


def test_a_mask_of_numbers_selects_where_it_is_not_0():
    stats = StepStats()
    stats.add_mean("a", torch.tensor([1.0, 5.0, 7.0]), torch.tensor([0.0, 0.5, 1.0]))
    stats.add_max("b", torch.tensor([9.0, 5.0]), torch.tensor([0.0, 2.0]))
    assert stats.compute() == {"a": 6.0, "b": 5.0}


@pytest.mark.parametrize("hidden", [math.inf, -math.inf, math.nan])
def test_what_is_masked_does_not_matter(hidden):
    stats, values = StepStats(), torch.tensor([1.0, hidden, 3.0])
    stats.add_mean("mean", values, masks(1, 0, 1))
    stats.add_max("max", values, masks(1, 0, 1))
    assert stats.compute() == {"max": 3.0, "mean": 2.0}


def test_sums_add_up():
    stats = StepStats()
    for value in (0.25, 0.5, -1.0):
        stats.add_sum("loss", torch.tensor(value))
    assert stats.compute() == {"loss": -0.25}


def test_a_sum_of_zero_is_reported():
    stats = StepStats()
    stats.add_sum("loss", torch.tensor(0.0))
    assert stats.compute() == {"loss": 0.0}


def test_the_largest_value_is_kept():
    stats = StepStats()
    stats.add_max("a", torch.tensor([-5.0, -2.0]), masks(1, 1))
    stats.add_max("a", torch.tensor([-3.0, 8.0]), masks(1, 0))
    assert stats.compute() == {"a": -2.0}


def test_means_and_maxima_of_nothing_are_left_out():
    stats = StepStats()
    stats.add_mean("mean", torch.tensor([1.0]), masks(0))
    stats.add_mean("none", torch.zeros(0))
    stats.add_max("max", torch.tensor([1.0]), masks(0))
    stats.add_max("void", torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert stats.compute() == {}


def test_compute_forgets():
    stats = StepStats()
    stats.add_mean("a", torch.tensor([1.0]))
    stats.add_max("b", torch.tensor([1.0]), masks(1))
    stats.compute()
    assert stats.compute() == {}


def test_values_are_detached():
    stats, values = StepStats(), torch.ones(3, requires_grad=True)
    stats.add_mean("a", values)
    stats.add_sum("b", values.sum())
    stats.add_max("c", values, masks(1, 1, 1))
    assert stats.compute() == {"a": 1.0, "b": 3.0, "c": 1.0}


def test_small_values_are_not_lost_in_a_long_sum():
    stats = StepStats()
    stats.add_sum("a", torch.tensor(1e8))
    for _ in range(10):
        stats.add_sum("a", torch.tensor(1.0))
    assert stats.compute() == {"a": 1e8 + 10}


def two_ranks(fill: Callable[[StepStats, int], None]) -> list[dict[str, float]]:
    """Run the same step on two ranks in turn: note what each would send, then answer both."""
    sent: list[list[tuple[torch.Tensor, str]]] = []
    for rank in range(2):
        stats, log = StepStats(), []
        fill(stats, rank)
        stats.compute(lambda t, op, log=log: (log.append((t.clone(), op)), t)[1])
        sent.append(log)
    answers = [
        a + b if op == "sum" else torch.maximum(a, b)
        for (a, op), (b, other) in zip(*sent, strict=True)
        if op == other
    ]
    out = []
    for rank in range(2):
        stats, replies = StepStats(), iter(answers)
        fill(stats, rank)
        out.append(stats.compute(lambda t, op, replies=replies: next(replies)))
    return out


def test_ranks_are_combined():
    def fill(stats: StepStats, rank: int) -> None:
        values = torch.tensor([1.0, 2.0, 3.0]) if rank == 0 else torch.tensor([10.0])
        stats.add_mean("mean", values, torch.ones_like(values))
        stats.add_sum("sum", torch.tensor(0.5 + rank))
        stats.add_max("max", values, torch.ones_like(values))

    expected = {"mean": 4.0, "sum": 2.0, "max": 10.0}
    assert two_ranks(fill) == [expected, expected]


def test_a_rank_without_values_changes_nothing():
    def fill(stats: StepStats, rank: int) -> None:
        stats.add_mean("mean", torch.tensor([5.0]), masks(1 - rank))
        stats.add_max("max", torch.tensor([-4.0]), masks(1 - rank))

    assert two_ranks(fill) == [{"mean": 5.0, "max": -4.0}] * 2


def test_a_step_costs_two_reductions():
    stats, operations = StepStats(), []
    for name in "abc":
        stats.add_mean(name, torch.ones(2))
        stats.add_sum(name + "_sum", torch.ones(()))
        stats.add_max(name + "_max", torch.ones(1), masks(1))
    stats.compute(lambda t, op: (operations.append(op), t)[1])
    assert operations == ["sum", "max"]


def test_a_sum_does_not_become_a_mean():
    stats = StepStats()
    stats.add_sum("a", torch.tensor(1.0))
    with pytest.raises(AssertionError, match="a is a sum"):
        stats.add_mean("a", torch.tensor([1.0]))


def test_a_mean_does_not_become_a_sum():
    stats = StepStats()
    stats.add_mean("a", torch.tensor([1.0]))
    with pytest.raises(AssertionError, match="a is a mean"):
        stats.add_sum("a", torch.tensor(1.0))


def test_what_was_measured_before_and_is_not_now_is_a_gap():
    stats = StepStats()
    assert stats.with_gaps({"a": 1.0, "rollout/b": 2.0}) == {"a": 1.0, "rollout/b": 2.0}
    assert stats.with_gaps({"c": 3.0}) == {"c": 3.0, "a": None}
    assert stats.with_gaps({"a": 4.0}) == {"a": 4.0, "c": None}
