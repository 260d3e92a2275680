"""Top-k log-probabilities, and the divergence from another model, from hidden states in chunks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.reference import close, f64, normal
from kdrl_lightning.losses import (
    TokenScores,
    generalized_jsd,
    reverse_kl,
    token_scores,
    with_tail,
)
from kdrl_lightning.losses.logprobs import Head, Other

N, H, V, K = 7, 3, 11, 4
IDS = torch.tensor([0, 10, 3, 3, 7, 1, 9])
CHUNKS = [None, 1, 2, 3, 7, 20]


def student() -> tuple[Tensor, Head]:
    weight, bias = normal(V, H, seed=1), normal(V, seed=2)
    hidden = normal(N, H, seed=0).requires_grad_()
    return hidden, Head(weight.requires_grad_(), bias.requires_grad_(), scale=1.5)


def other(vocab: int = V) -> Other:
    """Of another width, with padding rows after its vocabulary."""
    return Other(normal(N, 2, seed=3), Head(normal(vocab + 2, 2, seed=4), vocab_size=vocab))


def dense(head: Head, hidden: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ head.weight.T + (0.0 if head.bias is None else head.bias)) * head.scale
    return logits[:, : head.vocab_size] / temperature


def leaves(hidden: Tensor, head: Head) -> list[Tensor]:
    assert head.bias is not None
    return [hidden, head.weight, head.bias]


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_asked_log_probabilities_match_dense(chunk_size: int | None, temperature: float) -> None:
    hidden, head = student()
    asked = normal(N, V, seed=8).argsort(-1)[:, :K]
    got = token_scores(hidden, head, IDS, temperature, chunk_size, topk_ids=asked)
    expected = dense(head, hidden, temperature).log_softmax(-1).gather(-1, asked)
    assert got.topk_logprobs is not None and got.topk_ids is None and got.divergence is None
    close(got.topk_logprobs, expected)
    weights = normal(N, K, seed=9)
    for a, b in zip(
        torch.autograd.grad((got.topk_logprobs * weights).sum(), leaves(hidden, head)),
        torch.autograd.grad((expected * weights).sum(), leaves(hidden, head)),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("top_k", [1, K, V, V + 5])
def test_top_k_names_the_most_likely_best_first(chunk_size: int | None, top_k: int) -> None:
    hidden, head = student()
    got = token_scores(hidden, head, IDS, 0.7, chunk_size, top_k=top_k)
    assert got.topk_ids is not None and got.topk_logprobs is None
    order = dense(head, hidden, 0.7).argsort(-1, descending=True)
    assert torch.equal(got.topk_ids, order[:, :top_k])
    assert got.topk_ids.dtype == torch.int64


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("jsd_beta", [0.0, 0.4, 1.0])
def test_divergence_is_that_of_whole_distributions_at_one_temperature(
    chunk_size: int | None, temperature: float, jsd_beta: float
) -> None:
    hidden, head = student()
    divergence = partial(generalized_jsd, jsd_beta=jsd_beta)
    got = token_scores(
        hidden, head, IDS, temperature, chunk_size, other=other(), divergence=divergence
    ).divergence
    theirs = dense(other().head, other().hidden, temperature)
    expected = divergence(dense(head, hidden, temperature), theirs)
    assert got is not None
    close(got, expected)
    weights = normal(N, seed=9)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), leaves(hidden, head)),
        torch.autograd.grad((expected * weights).sum(), leaves(hidden, head)),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("chunk_size", [2, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_of_all_fields_add_up(chunk_size: int | None, softcap: float | None) -> None:
    hidden, head = student()
    head = replace(head, softcap=softcap)
    divergence = partial(generalized_jsd, jsd_beta=0.3)
    got = token_scores(hidden, head, IDS, 0.8, chunk_size, other=other(8), divergence=divergence)
    logits = head.logits(hidden) / 0.8
    theirs = dense(other(8).head, other(8).hidden, 0.8)
    logs = logits.log_softmax(-1)
    plain = (
        logs.gather(-1, IDS[:, None]).squeeze(-1),
        -(logs.exp() * logs).sum(-1),
        divergence(logits[:, :8], theirs),
    )
    weights = normal(3, N, seed=9)
    fields = (got.logprobs, got.entropy, got.divergence)
    loss = sum((w * f).sum() for w, f in zip(weights, fields, strict=True) if f is not None)
    expected = sum((w * f).sum() for w, f in zip(weights, plain, strict=True))
    assert isinstance(loss, Tensor) and isinstance(expected, Tensor)
    for a, b in zip(
        torch.autograd.grad(loss, leaves(hidden, head)),
        torch.autograd.grad(expected, leaves(hidden, head)),
        strict=True,
    ):
        assert float((a - b).abs().max()) < 1e-10


def test_the_other_model_is_run_in_the_precision_of_the_student() -> None:
    hidden, head, theirs = normal(N, H, seed=0).float(), normal(V, H, seed=1).float(), other()
    weight = theirs.head.weight.float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = token_scores(
            hidden.bfloat16().requires_grad_(),
            Head(head.requires_grad_()),
            IDS,
            other=Other(theirs.hidden.bfloat16(), Head(weight, vocab_size=V)),
            divergence=reverse_kl,
        )
    assert scores.divergence is not None
    scores.divergence.sum().backward()  # rebuilt outside of autocast
    exact = token_scores(
        normal(N, H, seed=0), Head(normal(V, H, seed=1)), IDS, other=theirs, divergence=reverse_kl
    )
    assert exact.divergence is not None and head.grad is not None
    close(scores.divergence.double(), exact.divergence, 0.05)


def test_a_smaller_vocabulary_is_compared_on_its_own_rows() -> None:
    hidden, head = student()
    got = token_scores(hidden, head, IDS, other=other(8), divergence=reverse_kl).divergence
    theirs = dense(other(8).head, other(8).hidden, 1.0)
    close(got, reverse_kl(dense(head, hidden, 1.0)[:, :8], theirs))
    # As the one that is asked, it gives what it does not have no probability.
    asked = torch.tensor([[0, 7, 8, 10]]).expand(N, 4)
    at = token_scores(*other(8)[:1], other(8).head, IDS.clamp(max=7), topk_ids=asked).topk_logprobs
    assert at is not None
    close(at[:, :2], theirs.log_softmax(-1)[:, [0, 7]])
    assert at[:, 2:].eq(-math.inf).all()


def test_the_other_model_gets_no_gradient() -> None:
    hidden, head = student()
    states = normal(N, 2, seed=3).requires_grad_()
    weight = normal(V, 2, seed=4).requires_grad_()
    scores = token_scores(
        hidden, head, IDS, chunk_size=2, other=Other(states, Head(weight)), divergence=reverse_kl
    )
    assert scores.divergence is not None
    scores.divergence.sum().backward()
    assert states.grad is None and weight.grad is None
    assert hidden.grad is not None and hidden.grad.ne(0).any()


@pytest.mark.parametrize("grad", [True, False])
def test_all_fields_together_are_those_apart(grad: bool) -> None:
    hidden, head = student()
    asked = normal(N, V, seed=8).argsort(-1)[:, :K]
    options = {"top_k": 2, "topk_ids": asked, "other": other(), "divergence": reverse_kl}
    with torch.set_grad_enabled(grad):
        for chunk_size in CHUNKS:
            both = token_scores(hidden, head, IDS, 0.8, chunk_size, **options)
            plain = token_scores(hidden, head, IDS, 0.8)
            close(both.logprobs, plain.logprobs)
            close(both.entropy, plain.entropy)
            assert all(x is not None and len(x) == N for x in both[:-2])  # no chunks
            assert plain[2:] == (None,) * 6
            assert both.logprobs.requires_grad == grad
            only = token_scores(hidden, head, IDS, 0.8, chunk_size, other=other())
            assert only.divergence is None


HEADS: list[dict[str, Any]] = [
    {},
    {"bias": None},
    {"scale": 2.0, "softcap": 0.8},
    {"vocab_size": 8, "softcap": 3.0},
]


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
@pytest.mark.parametrize("changes", HEADS, ids=lambda c: "-".join(c) or "plain")
def test_more_fields_leave_values_and_gradients_of_the_first_ones(
    changes: dict[str, Any], chunk_size: int
) -> None:
    hidden, head = student()
    head = replace(head, **changes)
    ids = IDS.clamp(max=(head.vocab_size or V) - 1)
    used = [x for x in (hidden, head.weight, head.bias) if x is not None]
    of_logprobs, of_entropy = normal(2, N, seed=9)
    found = []
    for asked in ({}, {"topk_ids": ids[:, None]}):
        scores = token_scores(hidden, head, ids, 0.6, chunk_size, top_k=2, **asked)
        assert scores.entropy is not None
        loss = (scores.logprobs * of_logprobs + scores.entropy * of_entropy).sum()
        found.append([*scores[:3], *torch.autograd.grad(loss, used)])
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    hidden, weight = normal(64, 2, seed=1).requires_grad_(), normal(50, 2, seed=2)
    ids = torch.arange(64) % 50
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        token_scores(hidden, Head(weight.requires_grad_()), ids, 1.0, 4, topk_ids=ids[:, None])
    assert sum(kept) < 64 * 50


def test_no_rows_give_empty_fields_with_a_graph() -> None:
    hidden, head = student()
    none = slice(0, 0)
    scores = token_scores(
        hidden[none],
        head,
        IDS[none],
        top_k=2,
        topk_ids=IDS[none, None],
        other=Other(other().hidden[none], other().head),
        divergence=reverse_kl,
    )
    assert [None if x is None else tuple(x.shape) for x in scores] == [
        (0,), (0,), (0, 2), (0, 1), (0,), (0,), None, None
    ]  # fmt: skip
    assert scores.divergence is not None
    scores.divergence.sum().backward()
    assert head.weight.grad is not None and head.weight.grad.eq(0).all()


def test_map_changes_every_field_that_is_there() -> None:
    scores = TokenScores(f64([1.0]), f64([2.0]), None, f64([[3.0]]), None, f64([4.0]), f64([5.0]))
    got = scores.map(lambda x: 2 * x)
    assert [None if x is None else x.tolist() for x in got] == [
        [2.0], [4.0], None, [[6.0]], None, [8.0], [10.0], None
    ]  # fmt: skip


def far(mass: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[V]`` whose last ones weigh ``mass`` together, a teacher's, and the other ids."""
    rest = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64)
    first = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    student = torch.cat([first * (1 - mass), rest * mass]).log()
    teacher = torch.cat([first.flip(0) * 0.99, rest.flip(0) * 0.01]).log()
    return student.to(dtype), teacher.to(dtype), torch.tensor([[1, 0, 2]])


@pytest.mark.parametrize("mass", [1e-3, 1e-5, 1e-7, 3e-8, 1e-9, 1e-12])
@pytest.mark.parametrize("jsd_beta", [0.0, 0.1, 0.5, 1.0])
def test_a_small_tail_keeps_its_gradient_in_float32(mass: float, jsd_beta: float) -> None:
    def loss_and_gradient(dtype: torch.dtype, swap: bool) -> tuple[Tensor, Tensor]:
        logits, theirs, asked = far(mass, dtype)
        logits, theirs = (theirs, logits) if swap else (logits, theirs)
        hidden = torch.ones(1, 1, dtype=dtype)
        weight = logits[:, None].clone().requires_grad_()
        one = torch.tensor([0])
        ours = token_scores(hidden, Head(weight), one, topk_ids=asked)
        other = token_scores(hidden, Head(theirs[:, None]), one, topk_ids=asked)
        assert ours.topk_logprobs is not None and other.topk_logprobs is not None
        loss = generalized_jsd(
            with_tail(ours.topk_logprobs, ours.tail_logprobs),
            with_tail(other.topk_logprobs, other.tail_logprobs),
            jsd_beta,
        )
        return loss.detach(), torch.autograd.grad(loss.sum(), weight)[0]

    for swap in (False, True):  # whose tail is small
        loss, gradient = loss_and_gradient(torch.float32, swap)
        exact, slope = loss_and_gradient(torch.float64, swap)
        close(loss.double(), exact, 1e-5 * max(1.0, float(exact)))
        close(gradient.double(), slope, 1e-5 * max(1.0, float(slope.abs().max())))


def test_a_tail_is_the_sum_of_what_was_not_asked_for() -> None:
    hidden, head = student()
    asked = normal(N, V, seed=8).argsort(-1)[:, :K]
    got = token_scores(hidden, head, IDS, 0.6, 3, topk_ids=asked)
    whole = dense(head, hidden, 0.6).softmax(-1)
    expected = whole.scatter(-1, asked, 0.0).sum(-1).log()
    assert got.tail_logprobs is not None
    close(got.tail_logprobs, expected)
    for a, b in zip(
        torch.autograd.grad(got.tail_logprobs.sum(), leaves(hidden, head)),
        torch.autograd.grad(expected.sum(), leaves(hidden, head)),
        strict=True,
    ):
        close(a, b)


def test_tokens_that_a_model_does_not_have_leave_its_tail_alone() -> None:
    hidden, head = student()
    few, many = torch.tensor([[2, 5]] * N), torch.tensor([[2, 5, V, V + 3]] * N)
    tails = [token_scores(hidden, head, IDS, topk_ids=ids).tail_logprobs for ids in (few, many)]
    assert tails[0] is not None and tails[1] is not None
    close(tails[1], tails[0])


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_tokens_that_a_model_does_not_have_give_no_gradient(chunk_size: int | None) -> None:
    hidden, head = student()
    asked = normal(N, V, seed=8).argsort(-1)[:, :K]
    gradients = []
    for ids in (asked, torch.cat([asked, torch.full((N, 1), V + 3)], -1)):
        got = token_scores(hidden, head, IDS, 0.7, chunk_size, topk_ids=ids)
        assert got.topk_logprobs is not None
        gradients.append(torch.autograd.grad(got.topk_logprobs.sum(), leaves(hidden, head)))
    for known, more in zip(*gradients, strict=True):
        close(known, more)


def test_a_tail_without_tokens_is_impossible_and_has_no_gradient() -> None:
    hidden, head = student()
    every = torch.arange(V).expand(N, V)
    got = token_scores(hidden, head, IDS, topk_ids=every)
    assert got.tail_logprobs is not None
    assert torch.equal(got.tail_logprobs, torch.full((N,), -math.inf, dtype=torch.float64))
    at = torch.where(got.tail_logprobs > -math.inf, got.tail_logprobs, 0.0)
    assert not any(g.any() for g in torch.autograd.grad(at.sum(), leaves(hidden, head)))
