"""The backward pass written by hand against plain autograd, both results used at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.reference import close, normal
from kdrl_lightning.losses.head.chunk_math import Transform, plain_math
from kdrl_lightning.losses.head.chunked_logprobs import ChosenTokens, Work
from kdrl_lightning.losses.logprobs import Head, token_scores

N, H, V = 7, 3, 11
IDS = torch.tensor([0, 10, 3, 3, 7, 1, 9])
PLAIN = Transform(1.0, None, 1.0)
TRANSFORMS = [
    PLAIN,
    Transform(1.0, None, 0.7),
    Transform(0.25, None, 3.0),
    Transform(1.0, 1.5, 1.0),
    Transform(2.0, 0.8, 0.5),
]
SIZES = [1, 3, N]  # a row, a last chunk that is shorter, one chunk; two rows are scored at once


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden states, weight and bias."""
    parts = normal(N, H, seed=0), normal(V, H, seed=1), normal(V, seed=2)
    return [part.to(dtype).requires_grad_() for part in parts]


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: Transform
) -> tuple[Tensor, Tensor]:
    """The definition on a whole table of logits."""
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    rows = (logits / transform.temperature).log_softmax(-1)
    # A token that cannot be drawn adds nothing: 0 times -inf would be NaN, also backwards.
    known = rows.masked_fill(rows == -math.inf, 0.0)
    return rows.gather(-1, ids[:, None]).squeeze(-1), -(rows.exp() * known).sum(-1)


def ours(parts: list[Tensor], transform: Transform, size: int) -> tuple[Tensor, Tensor]:
    hidden, weight, *rest = parts
    bias = rest[0] if rest else None
    work = Work(transform, size, plain_math(2 * V))
    logprobs, entropy, *_ = ChosenTokens.apply(hidden, weight, bias, IDS, work)
    return logprobs, entropy


def combined(scores: tuple[Tensor, Tensor], used: str = "both") -> Tensor:
    """A loss in which every token's log-probability and entropy has a separate weight."""
    of_logprobs, of_entropy = normal(2, N, seed=5)
    total = scores[0].new_zeros(())
    if used != "entropy":
        total = total + (scores[0] * of_logprobs).sum()
    if used != "logprobs":
        total = total + (scores[1] * of_entropy).sum()
    return total


@pytest.mark.parametrize("used", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_autograds(
    size: int, transform: Transform, with_bias: bool, used: str
) -> None:
    parts = leaves()[: 3 if with_bias else 2]
    found = ours(parts, transform, size)
    hidden, weight, bias = [*parts, None][:3]
    assert hidden is not None and weight is not None
    expected = plain(hidden, weight, bias, IDS, transform)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    mine = torch.autograd.grad(combined(found, used), parts)
    theirs = torch.autograd.grad(combined(expected, used), parts)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_gradients_are_those_of_small_changes(transform: Transform) -> None:
    assert torch.autograd.gradcheck(lambda *x: ours(list(x), transform, 3), leaves())


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_float32_is_near_float64(size: int, transform: Transform) -> None:
    narrow, wide = leaves(torch.float32), leaves()
    for leaf, exact in zip(narrow, wide, strict=True):
        exact.data.copy_(leaf.data)
    found, expected = ours(narrow, transform, size), plain(*wide, IDS, transform)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        close(a, b, 1e-5)  # float32
    mine = torch.autograd.grad(combined(found), narrow)
    theirs = torch.autograd.grad(combined(expected), wide)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32
        close(a, b, 1e-5)  # float32


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_is_near_float64(size: int, autocast: bool) -> None:
    kept = torch.float32 if autocast else torch.bfloat16
    narrow, wide = leaves(torch.bfloat16), leaves()
    for leaf, exact in zip(narrow, wide, strict=True):
        exact.data.copy_(leaf.data)
    narrow = [leaf.detach().to(kept).requires_grad_() for leaf in narrow]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = ours(narrow, PLAIN, size)
    expected = plain(*wide, IDS, PLAIN)
    mine = torch.autograd.grad(combined(found), narrow)
    theirs = torch.autograd.grad(combined(expected), wide)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        # Logits of up to 5 come out of the product with 8 bits: half a unit there is 2^-7.
        close(a, b, 2**-6)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == kept
        # As above, and the table of gradients is rounded to 8 bits before its products.
        assert (a.double() - b).norm() < 2**-6 * b.norm()


@pytest.mark.parametrize("used", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize("size", SIZES)
def test_tokens_that_cannot_be_drawn_have_no_part(size: int, used: str) -> None:
    parts = leaves()
    excluded = [2, 4, 5, 6, 8]
    parts[2].data[excluded] = -math.inf
    found, expected = ours(parts, PLAIN, size), plain(*parts, IDS, PLAIN)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    mine = torch.autograd.grad(combined(found, used), parts)
    theirs = torch.autograd.grad(combined(expected, used), parts)
    for a, b in zip(mine, theirs, strict=True):
        assert a.isfinite().all()
        close(a, b)
    assert mine[1][excluded].eq(0).all() and mine[2][excluded].eq(0).all()


def test_a_certain_token_has_no_entropy_and_no_gradient() -> None:
    hidden, weight, bias = leaves()
    bias.data.fill_(-math.inf)[3] = 0.0
    ids = torch.full_like(IDS, 3)
    work = Work(PLAIN, 2, plain_math(2 * V))
    logprobs, entropy, *_ = ChosenTokens.apply(hidden, weight, bias, ids, work)
    assert logprobs.eq(0).all() and entropy.eq(0).all()
    for gradient in torch.autograd.grad((logprobs + entropy).sum(), [hidden, weight, bias]):
        assert gradient.eq(0).all()


@pytest.mark.parametrize("size", SIZES)
def test_rows_behind_the_vocabulary_do_not_count(size: int) -> None:
    hidden, weight, bias = leaves()
    head, ids = Head(weight, bias, 2.0, 3.0, vocab_size=8), IDS.clamp(max=7)
    found = token_scores(hidden, head, ids, 0.9, size, top_k=2)
    expected = plain(hidden, weight[:8], bias[:8], ids, Transform(2.0, 3.0, 0.9))
    assert found.entropy is not None and found.topk_ids is not None
    close(found.logprobs, expected[0])
    close(found.entropy, expected[1])
    assert found.topk_ids.max() < 8
    mine = torch.autograd.grad(combined((found.logprobs, found.entropy)), [hidden, weight, bias])
    theirs = torch.autograd.grad(combined(expected), [hidden, weight, bias])
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2)])
def test_a_frozen_part_gets_no_gradient_and_changes_no_other(trained: tuple[int, ...]) -> None:
    parts = leaves()
    expected = torch.autograd.grad(combined(ours(parts, PLAIN, 3)), parts)
    for i, part in enumerate(parts):
        part.requires_grad_(i in trained)
    combined(ours(parts, PLAIN, 3)).backward()
    for i, part in enumerate(parts):
        assert (part.grad is not None) == (i in trained)
        assert part.grad is None or torch.equal(part.grad, expected[i])


def test_the_inputs_are_left_as_they_are() -> None:
    parts = leaves()
    before: Any = [part.detach().clone() for part in parts]
    combined(ours(parts, TRANSFORMS[-1], 3)).backward()
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
