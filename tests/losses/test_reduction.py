"""Reductions against slow references, for any cut of a step, with garbage in masked tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.reference import close, f64, normal, token_weights
from kdrl_lightning.losses import constant_length, group_token_mean, sequence_mean, token_mean

NAMES = ["token_mean", "sequence_mean", "constant_length", "group_token_mean"]
MAX_TOKENS = 9
GROUPS = [0, 0, 1, 1, 2, 2, 3, 3]
LENGTHS = [1, 5, 0, 3, 7, 7, 0, 0]


def mask_of(lengths: list[int], width: int = 7) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def share(
    name: str,
    per_token: Tensor,
    mask: Tensor,
    rows: slice = slice(None),
    lengths: list[int] = LENGTHS,
    groups: list[int] = GROUPS,
    number: Callable[[float], float | Tensor] = float,
) -> Tensor:
    """Share of some rows of the step that ``lengths`` and ``groups`` describe."""
    completions = number(sum(n > 0 for n in lengths))
    prompts = number(len({g for g, n in zip(groups, lengths, strict=True) if n}))
    per_group = torch.tensor(
        [sum(n for h, n in zip(groups, lengths, strict=True) if h == g) for g in groups]
    ).double()
    values, kept = per_token[rows], mask[rows]
    if name == "token_mean":
        return token_mean(values, kept, number(sum(lengths)))
    if name == "sequence_mean":
        return sequence_mean(values, kept, completions)
    if name == "constant_length":
        return constant_length(values, kept, completions, MAX_TOKENS)
    return group_token_mean(values, kept, per_group[rows], prompts)


def slow(name: str, values: Tensor, lengths: list[int], groups: list[int]) -> float:
    weights = token_weights(lengths, groups, name, MAX_TOKENS)
    return math.fsum(
        w * float(values[i, t])
        for i, (w, n) in enumerate(zip(weights, lengths, strict=True))
        for t in range(n)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [float, int, torch.tensor], ids=["float", "int", "tensor"])
def test_matches_slow_reference(name: str, number: Callable[[float], float | Tensor]) -> None:
    values = normal(8, 7, seed=0).requires_grad_()
    got = share(name, values, mask_of(LENGTHS), number=number)
    close(got, slow(name, values.detach(), LENGTHS, GROUPS))
    (gradient,) = torch.autograd.grad(got, values)
    weights = f64(token_weights(LENGTHS, GROUPS, name, MAX_TOKENS))
    close(gradient, weights[:, None] * mask_of(LENGTHS))


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6).flatmap(
        lambda lengths: st.tuples(
            st.just(lengths),
            st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)),
        )
    ),
    st.sampled_from(NAMES),
    st.integers(0, 1000),
)
def test_any_step_matches_slow_reference(
    step: tuple[list[int], list[int]], name: str, seed: int
) -> None:
    lengths, groups = step
    values = normal(len(lengths), 4, seed=seed)
    got = share(name, values, mask_of(lengths, 4), lengths=lengths, groups=groups)
    close(got, slow(name, values, lengths, groups))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_cut_leaves_value_and_gradient(name: str, parts: int) -> None:
    values = normal(8, 7, seed=1).requires_grad_()
    mask = mask_of(LENGTHS)
    whole = share(name, values, mask)
    (expected,) = torch.autograd.grad(whole, values)
    size = 8 // parts
    total = 0.0
    for i in range(parts):
        piece = share(name, values, mask, slice(i * size, (i + 1) * size))
        piece.backward()
        total += piece.item()
    close(total, whole)
    assert values.grad is not None
    close(values.grad, expected)


@pytest.mark.parametrize("name", NAMES)
def test_masking_is_dropping(name: str) -> None:
    values = normal(8, 7, seed=2)
    mask = mask_of(LENGTHS)
    # A masked token in the middle of a row, and the same row without it.
    mask[5, 3] = False
    lengths = [*LENGTHS[:5], 6, *LENGTHS[6:]]
    dropped = values.clone()
    dropped[5, 3:6] = values[5, 4:7]
    masked = share(name, values, mask, lengths=lengths)
    close(masked, share(name, dropped, mask_of(lengths), lengths=lengths))
    # Rows without a token can be dropped, too.
    rows = [i for i, n in enumerate(lengths) if n]
    short, groups = [lengths[i] for i in rows], [GROUPS[i] for i in rows]
    close(masked, share(name, dropped[rows], mask_of(short), lengths=short, groups=groups))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_under_the_mask_does_not_leak(name: str, garbage: float) -> None:
    mask = mask_of(LENGTHS)
    clean = normal(8, 7, seed=3)
    dirty = clean.masked_fill(~mask, garbage).requires_grad_()
    got = share(name, dirty, mask)
    close(got, share(name, clean, mask))
    (gradient,) = torch.autograd.grad(got, dirty)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_may_be_of_any_type(name: str, dtype: torch.dtype) -> None:
    values, mask = normal(8, 7, seed=4), mask_of(LENGTHS)
    assert torch.equal(share(name, values, mask.to(dtype)), share(name, values, mask))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [float, torch.tensor], ids=["float", "tensor"])
def test_fully_masked_gives_zero_with_a_graph(
    name: str, number: Callable[[float], float | Tensor]
) -> None:
    values = normal(8, 7, seed=5).requires_grad_()
    nothing = [0] * 8
    got = share(name, values, mask_of(nothing), lengths=nothing, number=number)
    assert got.item() == 0.0
    got.backward()
    assert values.grad is not None
    assert (values.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_fully_masked_part_of_a_step_gives_zero_with_a_graph(name: str) -> None:
    values = normal(8, 7, seed=6).requires_grad_()
    got = share(name, values, mask_of(LENGTHS), slice(6, 8))
    assert got.item() == 0.0
    got.backward()
    assert values.grad is not None
    assert (values.grad == 0).all()


def test_goldens_by_hand() -> None:
    values = f64([[1.0, 2.0, 99.0], [4.0, 99.0, 99.0]])
    mask = mask_of([2, 1], 3)
    close(token_mean(values, mask, 3), 7 / 3)
    close(sequence_mean(values, mask, 2), (1.5 + 4) / 2)
    close(constant_length(values, mask, 2, 10), 7 / 20)
    # Two completions of two prompts, whose groups have 4 and 8 tokens.
    close(group_token_mean(values, mask, torch.tensor([4.0, 8.0]), 2), (3 / 4 + 4 / 8) / 2)
