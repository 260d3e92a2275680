"""The partition into micro-batches against brute force over all cuts of the sorted rows."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rollout.updates.partition import partition

CASES = st.lists(st.integers(1, 60), min_size=1, max_size=9).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.integers(1, len(lengths)))
)
quick = settings(derandomize=True, max_examples=150, deadline=None)


def sizes(lengths: list[int], cut: list[list[int]]) -> list[int]:
    """Padded tokens of each part."""
    return [len(rows) * max(lengths[r] for r in rows) for rows in cut]


def every_cut(lengths: list[int], parts: int) -> list[list[int]]:
    """Padded tokens of each part, for every way to cut the sorted rows into contiguous parts."""
    ordered = sorted(lengths)
    return [
        [(b - a) * ordered[b - 1] for a, b in pairwise([0, *inner, len(ordered)])]
        for inner in combinations(range(1, len(ordered)), parts - 1)
    ]


@quick
@given(CASES)
def test_every_row_once_in_nonempty_parts_of_the_asked_number(case):
    lengths, parts = case
    cut = partition(lengths, parts)
    assert len(cut) == parts
    assert all(cut)
    assert sorted(r for rows in cut for r in rows) == list(range(len(lengths)))
    assert all(type(r) is int for rows in cut for r in rows)


@quick
@given(CASES)
def test_rows_are_in_order_of_length_and_equal_ones_in_order_of_index(case):
    lengths, parts = case
    flat = [r for rows in partition(lengths, parts) for r in rows]
    assert flat == sorted(flat, key=lambda r: (lengths[r], r))


@quick
@given(CASES)
def test_padded_tokens_are_within_one_percent_of_the_best_cut(case):
    lengths, parts = case
    best = min(map(sum, every_cut(lengths, parts)))
    assert sum(sizes(lengths, partition(lengths, parts))) <= 1.01 * best + 1e-9


@quick
@given(CASES)
def test_largest_part_is_no_larger_than_that_of_a_least_padded_cut(case):
    lengths, parts = case
    cuts = every_cut(lengths, parts)
    best = min(map(sum, cuts))
    assert max(sizes(lengths, partition(lengths, parts))) <= max(
        max(cut) for cut in cuts if sum(cut) == best
    )


@quick
@given(CASES)
def test_largest_part_is_nearly_the_smallest_that_the_slack_allows(case):
    lengths, parts = case
    cuts = every_cut(lengths, parts)
    best = min(map(sum, cuts))
    smallest = min(max(cut) for cut in cuts if sum(cut) <= 1.01 * best)
    # The bisection stops at one token or half a percent, whichever is more.
    assert max(sizes(lengths, partition(lengths, parts))) <= max(smallest + 1, smallest / 0.995)


@quick
@given(CASES, st.floats(0.0, 1.0))
def test_a_limit_of_the_worst_case_is_kept_at_the_least_padding_that_it_allows(case, more):
    lengths, parts = case
    worst = -(-len(lengths) // parts) * max(lengths)
    limit = worst + more * (sum(lengths) + len(lengths) * max(lengths) - worst)
    found = sizes(lengths, partition(lengths, parts, limit))
    allowed = [cut for cut in every_cut(lengths, parts) if max(cut) <= limit]
    assert max(found) <= limit
    assert sum(found) <= 1.01 * min(map(sum, allowed)) + 1e-9


def test_without_a_limit_all_long_rows_may_be_one_part():
    lengths = [1, 9, 9, 9, 9, 9]
    assert sizes(lengths, partition(lengths, 2)) == [1, 45]
    assert sizes(lengths, partition(lengths, 2, 27)) == [27, 27]


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_equal_lengths_need_no_padding(parts):
    cut = partition([7] * 6, parts)
    assert sum(sizes([7] * 6, cut)) == 42
    assert len(cut) == parts and all(cut)


def test_equal_lengths_are_cut_evenly():
    assert sorted(map(len, partition([7] * 6, 3))) == [2, 2, 2]


def test_as_many_parts_as_rows_gives_single_rows():
    assert partition([5, 2, 9, 2], 4) == [[1], [3], [0], [2]]


def test_long_rows_are_kept_from_short_ones():
    # Sorted: 1 1 1 1 | 8 9. Cut there, 4 + 18 = 22 padded tokens; one row later, 40 + 9.
    assert partition([9, 1, 1, 1, 8, 1], 2) == [[1, 2, 3, 5], [4, 0]]


def test_one_part_takes_all_rows():
    assert partition([3, 1, 2], 1) == [[1, 2, 0]]


@pytest.mark.parametrize(("rows", "parts"), [(0, 1), (1, 2), (3, 4)])
def test_more_parts_than_rows_is_refused(rows, parts):
    with pytest.raises(ConfigurationError) as caught:
        partition([4] * rows, parts)
    assert str(caught.value) == (
        "`accumulate_grad_batches` must be at most the completions of one optimizer step on "
        f"one process, {rows}: got {parts}. Lower it, or sample more completions."
    )


def test_a_large_rollout_is_cut_with_little_padding():
    lengths = np.random.default_rng(0).lognormal(6, 0.7, 512).astype(int).clip(10, 4096).tolist()
    cut = partition(lengths, 16)
    assert sorted(r for rows in cut for r in rows) == list(range(512))
    assert len(cut) == 16 and all(cut)
    ordered = sorted(lengths)
    even = sum(32 * ordered[i + 31] for i in range(0, 512, 32))
    assert sum(sizes(lengths, cut)) <= min(even, 1.15 * sum(lengths))
