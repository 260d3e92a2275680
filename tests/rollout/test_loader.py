"""The train loader's integers, and the order in which prompts are taken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_lightning.rollout.loader import IndexLoader, prompt_stream

SIZES = st.integers(1, 12)
quick = settings(derandomize=True, max_examples=80, deadline=None)


@quick
@given(size=SIZES, passes=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_pass_is_a_permutation(size, passes, seed):
    stream = prompt_stream(0, passes * size, size, seed)
    for start in range(0, passes * size, size):
        assert sorted(stream[start : start + size]) == list(range(size))


@quick
@given(size=SIZES, start=st.integers(0, 40), first=st.integers(0, 20), then=st.integers(0, 20))
def test_calls_continue_one_stream(size, start, first, then):
    whole = prompt_stream(start, first + then, size, 3)
    assert whole == prompt_stream(start, first, size, 3) + prompt_stream(
        start + first, then, size, 3
    )


def test_same_seed_same_order_other_seed_other_order():
    orders = {tuple(prompt_stream(0, 20, 20, seed)) for seed in [0, 1, 2, 0]}
    assert len(orders) == 3


def test_passes_are_shuffled_anew():
    stream = prompt_stream(0, 40, 20, seed=0)
    assert stream[:20] != stream[20:]


def test_rows_are_plain_integers():
    assert {type(row) for row in prompt_stream(0, 5, 5, 0)} == {int}


def test_each_place_of_a_pass_sees_every_row_equally_often():
    # 3000 seeds, 6 rows: 500 expected at each place; 5 sigma is about 102.
    counts = [0] * 6
    for seed in range(3000):
        counts[prompt_stream(0, 1, 6, seed)[0]] += 1
    assert all(abs(count - 500) < 102 for count in counts)


def test_loader_yields_indices_modulo_the_modulus():
    assert list(IndexLoader(7, 3)) == [0, 1, 2, 0, 1, 2, 0]


def test_loader_without_modulus_counts_up():
    assert list(IndexLoader(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [0, 1, 6])
def test_loader_is_sized(length):
    loader = IndexLoader(length)
    assert len(loader) == length == len(list(loader))


def test_loader_starts_over_each_time():
    loader = IndexLoader(3)
    assert list(loader) == list(loader)


def test_loader_has_no_state():
    loader = IndexLoader(3)
    assert loader.state_dict() == {}
    loader.load_state_dict({"position": 2})
    assert list(loader) == [0, 1, 2]


def test_the_order_is_numpys_permutation_of_seed_and_pass():
    passes = [np.random.default_rng([5, epoch]).permutation(7).tolist() for epoch in range(3)]
    assert prompt_stream(0, 21, 7, 5) == [row for rows in passes for row in rows]
