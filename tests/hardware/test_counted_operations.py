"""Operations of all micro-batches, fitted to those of a few counted ones."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.flops import fitted, of_all_layers

ROWS = np.random.default_rng(0).integers(100, 4000, 24).astype(float)


def test_operations_of_uncounted_micro_batches_follow_from_counted_ones() -> None:
    """Linear in the tokens and in their squares, as layers and attention are; two kinds of pass."""
    squares = np.where(np.arange(24) % 2, ROWS**2, 0.0)
    whole = np.stack([3.0 * ROWS + 5e-3 * squares, 9.0 * ROWS + 2e-2 * squares], 1)
    asked: list[int] = []

    def count(i: int) -> np.ndarray:
        asked.append(i)
        return whole[i]

    terms = np.stack([ROWS, squares], 1).tolist()
    np.testing.assert_allclose(fitted(terms, count), whole, rtol=1e-9)
    assert len(set(asked)) < 12  # few are counted


def test_a_count_that_is_no_sum_of_its_terms_is_refused() -> None:
    terms = np.stack([ROWS, ROWS**2], 1).tolist()
    with pytest.raises(RuntimeError, match="operations are not a sum of these terms"):
        fitted(terms, lambda i: np.array([ROWS[i] ** 3, ROWS[i]]))


def test_layers_count_alike() -> None:
    def count(layers: int) -> np.ndarray:
        return np.array([7.0 + 3.0 * layers])

    assert of_all_layers(count, 28).tolist() == [91.0]
