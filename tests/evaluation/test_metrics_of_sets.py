"""pass@k and majority@k against all subsets; intervals; tables over uneven shards."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import combinations, permutations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_lightning.evaluation import EvaluationMetric, bootstrap_interval, majority_at_k, pass_at_k

CASES = settings(derandomize=True, max_examples=60, deadline=None)


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_part_of_the_subsets_with_a_right_one(n: int) -> None:
    for c in range(n + 1):
        row = torch.tensor([[True] * c + [False] * (n - c)])
        for k in range(1, n + 1):
            subsets = list(combinations(row[0].tolist(), k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(row, k).item() == pytest.approx(expected, abs=1e-12)


def test_pass_at_1_is_the_mean_and_pass_at_n_is_any() -> None:
    correct = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert pass_at_k(correct, 1).tolist() == pytest.approx([0.5, 0.0, 1.0], abs=1e-12)
    assert pass_at_k(correct, 4).tolist() == [1.0, 0.0, 1.0]


def test_pass_at_k_of_many_samples_is_exact() -> None:
    # 1 - C(1990, 100) / C(2000, 100): a product of 100 float32 factors is off in the fifth digit.
    correct = torch.zeros(1, 2000, dtype=torch.bool)
    correct[0, :10] = True
    expected = 1 - Fraction(comb(1990, 100), comb(2000, 100))
    assert pass_at_k(correct, 100).item() == pytest.approx(float(expected), abs=1e-15)


def brute_majority(answers: list[int], correct: list[bool], k: int) -> Fraction:
    """All ordered draws of k completions; the first of the most frequent answers wins."""
    total, draws = Fraction(0), 0
    for order in permutations(range(len(answers)), k):
        draws += 1
        votes = Counter(answers[i] for i in order if answers[i] >= 0)
        if votes:  # Counter keeps the order of first occurrence, and max takes the first
            winner = max(votes, key=lambda answer: votes[answer])
            own = [c for a, c in zip(answers, correct, strict=True) if a == winner]
            total += Fraction(sum(own), len(own))
    return total / draws


@CASES
@given(st.lists(st.tuples(st.integers(-1, 3), st.booleans()), min_size=1, max_size=6), st.data())
def test_majority_at_k_is_the_vote_of_all_ordered_draws(
    rows: list[tuple[int, bool]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(rows)))
    answers, correct = [a for a, _ in rows], [c for _, c in rows]
    found = majority_at_k(torch.tensor([answers]), torch.tensor([correct]), k).item()
    assert found == pytest.approx(float(brute_majority(answers, correct, k)), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "correct", "k", "expected"),
    [
        ([0, 0, 1], [1, 1, 0], 3, 1.0),
        ([0, 1, 1], [1, 0, 0], 3, 0.0),
        ([0, 1], [1, 0], 2, 0.5),  # a tie
        ([0, -1, -1, -1], [1, 0, 0, 0], 4, 1.0),  # silence does not vote
        ([-1, -1], [0, 0], 2, 0.0),
        ([0, 1, 2, 2], [1, 0, 0, 0], 1, 0.25),  # one draw is pass@1
    ],
)
def test_votes_by_hand(answers: list[int], correct: list[int], k: int, expected: float) -> None:
    table = torch.tensor([correct]).bool()
    assert majority_at_k(torch.tensor([answers]), table, k).item() == pytest.approx(expected)


def test_majority_of_sixty_four_ends() -> None:
    # 20 equal right answers against 44 different wrong ones: half of them outvote any other.
    answers = torch.tensor([[0] * 20 + list(range(1, 45))])
    assert majority_at_k(answers, answers == 0, 32).item() == pytest.approx(1.0, abs=1e-3)
    assert majority_at_k(answers, answers == 0, 1).item() == pytest.approx(20 / 64, abs=1e-12)


@pytest.mark.parametrize("k", [0, 3])
def test_k_beyond_the_samples_is_refused(k: int) -> None:
    table = torch.zeros(1, 2, dtype=torch.bool)
    words = rf"`k` must be from 1 to the 2 completions of a prompt: got {k}\."
    with pytest.raises(ValueError, match=words):
        pass_at_k(table, k)
    with pytest.raises(ValueError, match=words):
        majority_at_k(table.long(), table, k)


def test_the_interval_covers_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    truth, inside = 0.3, 0
    for seed in range(200):
        low, high = bootstrap_interval((torch.rand(100) < truth).double(), 0.95, 200, seed)
        inside += low <= truth <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_the_interval_is_that_of_its_seed_and_holds_the_mean() -> None:
    values = torch.arange(20) / 20
    first = bootstrap_interval(values, seed=3)
    assert first == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert first[0] < values.mean() < first[1]
    wide, narrow = (bootstrap_interval(values, level) for level in (0.99, 0.5))
    assert wide[0] < narrow[0] and narrow[1] < wide[1]


@pytest.mark.parametrize("size", [1, 8, 30, 500])
def test_without_a_single_hit_the_interval_is_not_empty(size: int) -> None:
    """The largest accuracy at which no hit in ``size`` prompts has a probability of 2.5 %."""
    low, high = bootstrap_interval(torch.zeros(size))
    assert low == 0.0 and (1.0 - high) ** size == pytest.approx(0.025)
    assert bootstrap_interval(torch.ones(size)) == (pytest.approx(1.0 - high), 1.0)
    assert bootstrap_interval(torch.full((size,), 0.5)) == (0.5, 0.5)  # every prompt says so


def table(size: int, n: int = 4) -> list[torch.Tensor]:
    """Columns of ``size`` prompts: correct, rewards, lengths, truncated, answers."""
    torch.manual_seed(1)
    correct = torch.rand(size, n) < 0.4
    lengths = torch.randint(1, 9, (size, n))
    answers = torch.randint(-1, 3, (size, n))
    return [correct, torch.rand(size, n), lengths, lengths == 8, answers]


def values(metric: EvaluationMetric) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


@CASES
@given(st.integers(1, 9), st.data())
def test_the_table_does_not_depend_on_who_saw_which_prompt(size: int, data: st.DataObject) -> None:
    columns = table(size)
    whole = EvaluationMetric(ks=[2, 4])
    whole.add(range(size), *columns)
    ranks = [EvaluationMetric(ks=[2, 4]) for _ in range(3)]
    order = data.draw(st.permutations(range(size)))
    cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2)))
    for metric, rows in zip(
        ranks, (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]), strict=True
    ):
        metric.add(rows, *(column[list(rows)] for column in columns))
    for other in ranks[1:]:
        ranks[0].merge_state(other)
    assert values(ranks[0]) == values(whole)


def test_values_by_hand() -> None:
    metric = EvaluationMetric(ks=[2])
    right = torch.tensor([[True, False], [True, True]])
    rewards, lengths = torch.tensor([[1.5, 0.0], [1.0, 1.0]]), torch.tensor([[2, 9], [3, 4]])
    metric.add([7, 3], right, rewards, lengths, lengths == 9, torch.tensor([[0, 1], [0, 0]]))
    found = values(metric)
    low, high = found.pop("accuracy_low"), found.pop("accuracy_high")
    assert 0.5 <= low <= 0.75 <= high <= 1.0
    assert found == {
        "accuracy": 0.75,
        "reward": 0.875,
        "length_mean": 4.5,
        "length_right": 3.0,
        "length_wrong": 9.0,
        "truncated_frac": 0.25,
        "pass_at_2": 1.0,
        "majority_at_2": 0.75,
    }


def test_what_nobody_has_is_left_out() -> None:
    metric = EvaluationMetric()
    columns = table(3)
    columns[0] = torch.ones_like(columns[0])
    metric.add([0, 1, 2], *columns)
    assert "length_wrong" not in values(metric) and "length_right" in values(metric)
    empty = EvaluationMetric()
    empty.add([], *(column[:0] for column in columns))
    assert empty.compute() == {}


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`rows` must have shape \[P, n, 6\]: got \[2, 3\]\."):
        EvaluationMetric().update(torch.zeros(2, 3))
