"""Gradients computed in the forward pass, for a loss that is known in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.reference import close, normal
from kdrl_lightning.losses import TokenScores, generalized_jsd, logprobs, token_scores
from kdrl_lightning.losses.head.chunk_math import Slopes, plain_math
from kdrl_lightning.losses.head.chunked_logprobs import common_factor
from kdrl_lightning.losses.head.head_products import HeadProducts
from kdrl_lightning.losses.logprobs import Head, Other

N, H, V = 7, 3, 11
IDS = torch.tensor([0, 10, 3, 3, 7, 1, 9])
OLD, ADVANTAGES = normal(N, seed=21) - 2.0, normal(N, seed=22)
CHUNKS = [1, 3, N]
# Tokens that are asked for; the last column is no token of this model.
ASKED = torch.cat([normal(N, V, seed=23).argsort(-1)[:, :3], torch.full((N, 1), V)], 1)
ASKED_WEIGHTS = normal(N, 4, seed=24)


def leaves() -> list[Tensor]:
    """Hidden states, weight and bias."""
    parts = normal(N, H, seed=0), normal(V, H, seed=1), normal(V, seed=2)
    return [part.requires_grad_() for part in parts]


def other(vocab: int = V) -> Other:
    return Other(normal(N, 2, seed=3), Head(normal(vocab, 2, seed=4)), scored=True)


def surrogate(scores: TokenScores) -> Tensor:
    """A clipped ratio, an entropy bonus, and whatever else was computed."""
    ratio = (scores.logprobs - OLD).exp()
    value = torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES).sum()
    assert scores.entropy is not None
    value = value + 0.3 * (scores.entropy**2).sum()
    if scores.divergence is not None and scores.other is not None:
        weights = (scores.other.logprobs - scores.logprobs.detach()).square()
        value = value + (weights * scores.divergence).sum()
    if scores.topk_logprobs is not None and scores.tail_logprobs is not None:
        value = value + (scores.topk_logprobs.exp() * ASKED_WEIGHTS).sum()
        value = value + (scores.tail_logprobs.exp() * ADVANTAGES).sum()
    return value


def only_logprobs(scores: TokenScores) -> Tensor:
    return (scores.logprobs * ADVANTAGES).sum()


def whole_sequence(scores: TokenScores) -> Tensor:
    """Couples the tokens."""
    return scores.logprobs.sum().exp() * 50.0


@pytest.fixture(autouse=True)
def two_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "math_for", lambda _: plain_math(2 * V))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each product that makes logits."""
    rows: list[int] = []
    inner = HeadProducts.logits

    def counted(self: HeadProducts, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return inner(self, hidden)

    monkeypatch.setattr(HeadProducts, "logits", counted)
    yield rows


def gradients(
    loss: Callable[[TokenScores], Tensor],
    known: Callable[[TokenScores], Tensor] | None,
    factor: float = 1.0,
    head: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[TokenScores, list[Tensor]]:
    hidden, weight, bias = leaves()
    given = Head(weight, bias, **(head or {}))
    scores = token_scores(hidden, given, IDS, loss=known, **options)
    (loss(scores) * factor).backward()
    return scores, [x.grad for x in (hidden, weight, bias) if x.grad is not None]


COMPARED = {"other": other(), "divergence": partial(generalized_jsd, jsd_beta=0.4)}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 1, "head": {"scale": 2.0, "softcap": 1.5}},
    COMPARED,
    {**COMPARED, "temperature": 1.7, "head": {"softcap": 3.0}, "top_k": 2},
    {**COMPARED, "other": other(8)},
    {"topk_ids": ASKED, "temperature": 0.7, "head": {"swap": (3, 9), "softcap": 2.0}},
    {**COMPARED, "topk_ids": ASKED, "top_k": 1},
]


@pytest.mark.parametrize("factor", [1.0, 6.0, -0.1])
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss", [surrogate, only_logprobs])
def test_gradients_are_those_of_the_plain_pass_and_no_logits_are_made_twice(
    products: list[int], loss: Any, options: dict[str, Any], chunk_size: int, factor: float
) -> None:
    if options.get("other") is not None and len(options["other"].head.weight) < V:
        options = {**options, "other": other(8)._replace(scored=False)}
    plain, expected = gradients(loss, None, factor, chunk_size=chunk_size, **options)
    assert sum(products) == 2 * N
    products.clear()
    ahead, found = gradients(loss, loss, factor, chunk_size=chunk_size, **options)
    assert sum(products) == N
    for a, b in zip(ahead[:-1], plain[:-1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)
    assert len(found) == 3
    for gradient, right in zip(found, expected, strict=True):
        close(gradient, right)


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize(
    ("loss", "known"),
    [
        (whole_sequence, whole_sequence),
        (surrogate, only_logprobs),
        (only_logprobs, surrogate),
        (lambda scores: surrogate(scores) + 1e-6 * scores.logprobs[0], surrogate),
        (surrogate, lambda scores: surrogate(scores) * torch.nan),
        (surrogate, lambda scores: torch.zeros(())),
    ],
)
def test_a_wrong_guess_changes_no_gradient(
    products: list[int], loss: Any, known: Any, chunk_size: int
) -> None:
    _, expected = gradients(loss, None, chunk_size=chunk_size)
    products.clear()
    _, found = gradients(loss, known, chunk_size=chunk_size)
    assert sum(products) == 2 * N
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_second_backward_pass_gives_the_same() -> None:
    hidden, weight, bias = leaves()
    scores = token_scores(hidden, Head(weight, bias), IDS, chunk_size=3, loss=surrogate)
    loss = surrogate(scores) * 3.0
    first = torch.autograd.grad(loss, [hidden, weight, bias], retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, [hidden, weight, bias]), first, strict=True):
        close(a, b)


def test_without_gradient_the_loss_is_not_asked() -> None:
    hidden, weight, bias = leaves()

    def never(scores: TokenScores) -> Tensor:
        raise AssertionError("asked")

    with torch.no_grad():
        token_scores(hidden, Head(weight, bias), IDS, loss=never)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2)])
def test_a_frozen_part_gets_no_gradient(trained: tuple[int, ...]) -> None:
    _, expected = gradients(surrogate, None)
    parts = leaves()
    for i, part in enumerate(parts):
        part.requires_grad_(i in trained)
    hidden, weight, bias = parts
    surrogate(token_scores(hidden, Head(weight, bias), IDS, loss=surrogate)).backward()
    for i, part in enumerate(parts):
        assert (part.grad is not None) == (i in trained)
        if part.grad is not None:
            close(part.grad, expected[i])


def test_no_tokens_have_gradients_of_zero() -> None:
    hidden, weight, bias = leaves()
    scores = token_scores(hidden[:0], Head(weight, bias), IDS[:0], loss=lambda s: s.logprobs.sum())
    scores.logprobs.sum().backward()
    assert weight.grad is not None and weight.grad.eq(0).all()


def test_the_other_models_scores_are_those_of_a_pass_of_its_own() -> None:
    hidden, weight, bias = leaves()
    compared: Any = {**COMPARED, "temperature": 0.6, "chunk_size": 3}
    found = token_scores(hidden, Head(weight, bias), IDS, **compared, loss=surrogate).other
    alone = token_scores(other().hidden, other().head, IDS, 0.6, top_k=1)
    assert found is not None and not found.logprobs.requires_grad
    for a, b in zip(found[:3], alone[:3], strict=True):
        close(a, b)
    unasked = token_scores(
        hidden, Head(weight, bias), IDS, **{**compared, "other": other()._replace(scored=False)}
    )
    assert unasked.other is None


def test_bfloat16_under_autocast_is_that_of_the_plain_pass() -> None:
    def found(known: Any) -> list[Tensor]:
        parts = [x.detach().float().requires_grad_() for x in leaves()]
        with torch.autocast("cpu", torch.bfloat16):
            scores = token_scores(
                parts[0], Head(*parts[1:]), IDS, chunk_size=3, **COMPARED, loss=known
            )
            loss = surrogate(scores)
        loss.backward()
        return [x.grad for x in parts if x.grad is not None]

    for a, b in zip(found(surrogate), found(None), strict=True):
        close(a, b, 1e-5)  # float32


def test_common_factor() -> None:
    first, second = normal(N, seed=1), normal(N, seed=2)
    known = Slopes(first, None, second)
    factor = common_factor(known, Slopes(first * 3.0, None, second * 3.0))
    assert factor is not None
    close(factor, 3.0)
    assert common_factor(known, Slopes(first * 3.0, None, second)) is None
    assert common_factor(known, Slopes(first, first, second)) is None
    assert common_factor(known, Slopes(first, None, second * torch.inf)) is None
    nothing = Slopes(torch.zeros(N), None, None)
    assert common_factor(nothing, nothing) == 1.0
    assert common_factor(nothing, Slopes(torch.ones(N), None, None)) is None
