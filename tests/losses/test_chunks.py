"""Chunks of a teacher with another tokenizer, by enumeration of all texts over two letters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from helpers.reference import close, f64, normal
from helpers.small_tokenizers import SPECIAL, by_hand, wrapped
from kdrl_lightning.losses import k2, k3, policy_gradient_kl, trrd_surrogate
from kdrl_lightning.losses.chunks import (
    chunk_share,
    chunk_sizes,
    chunk_totals,
    teacher_beside,
    whole_chunks,
)
from kdrl_lightning.teachers.cross_tokenizer import Aligner, Chunked, TokenBytes

END = 1


class Model:
    """A language model as a table: the next token's logits for each text so far."""

    def __init__(self, vocabulary: Sequence[int], seed: int) -> None:
        self.vocabulary, self.seed = list(vocabulary), seed
        self.rows: dict[tuple[int, ...], Tensor] = {}

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """``[T]`` log-probabilities of the tokens."""
        return torch.stack(
            [self.next(ids[:t])[self.vocabulary.index(i)] for t, i in enumerate(ids)]
        )

    def next(self, before: Sequence[int]) -> Tensor:
        key = tuple(before)
        if key not in self.rows:
            seed = self.seed + sum((i + 1) * 31**n for n, i in enumerate(key)) % 99991
            self.rows[key] = normal(len(self.vocabulary), seed=seed).requires_grad_()
        return self.rows[key].log_softmax(-1)

    def gradients(self, value: Tensor) -> dict[tuple[int, ...], Tensor]:
        rows = list(self.rows.items())
        found = torch.autograd.grad(value, [r for _, r in rows], allow_unused=True)
        return {
            k: torch.zeros_like(r) if g is None else g
            for (k, r), g in zip(rows, found, strict=True)
        }


def greedy(pieces: Sequence[str]) -> object:
    """A tokenizer that takes the longest piece from left to right, as WordPiece does."""
    names = [*SPECIAL, *pieces, *(f"##{p}" for p in pieces)]
    made = Tokenizer(models.WordPiece({t: i for i, t in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return wrapped(made)


def align(student: object, teacher: object) -> Callable[[Sequence[int]], Chunked]:
    found = Aligner(TokenBytes(student, "s", [END]), TokenBytes(teacher, "t", [END]), [END])
    return lambda ids: found([np.array(ids)], [END])[0]


def sums(model: Model, one: Chunked) -> tuple[Tensor, Tensor]:
    """``[1, T]`` the teacher's sum of each token's chunk, and the places."""
    theirs = model.logprobs(one.teacher_ids.tolist()).detach()[None]
    totals = chunk_totals(theirs, torch.tensor(one.teacher_places)[None])
    return totals.gather(1, torch.tensor(one.columns)[None]), torch.tensor(one.places)[None]


LETTERS = by_hand("ab")
PAIRS = ["aa", "ab", "ba", "bb"]


def expected(
    student: Model,
    teacher: Model,
    texts: Sequence[Sequence[int]],
    aligned: Callable[[Sequence[int]], Chunked],
    loss: Callable[[Tensor, Tensor], Tensor],
    last: int,
) -> dict[tuple[int, ...], Tensor]:
    """Gradient of the expected loss over all texts, of chunks that begin by token ``last``."""
    total = f64(0.0)
    for ids in texts:
        logprobs = student.logprobs(ids)[None]
        theirs, places = sums(teacher, aligned(ids))
        beside = teacher_beside(theirs, logprobs, places)
        first = torch.arange(len(ids)) - places
        per_token = chunk_share(loss(logprobs, beside), places)
        total = total + logprobs.detach().sum().exp() * per_token[first <= last].sum()
    return student.gradients(total)


def chunk_kl(
    student: Model,
    teacher: Model,
    aligned: Callable[[Sequence[int]], Chunked],
    code: Sequence[Sequence[int]],
    last: int,
    forward: bool = False,
) -> dict[tuple[int, ...], Tensor]:
    """Gradient of the KL of the next chunk, at each text that can stand before a chunk.

    The weights of the texts are held fixed. A chunk is one action: a word of a prefix code.
    """
    total, texts = f64(0.0), [()]
    while texts:
        before = texts.pop()
        reach = student.logprobs(before).sum().exp().detach() if before else f64(1.0)
        for word in code:
            ids = (*before, *word)
            ours = student.logprobs(ids)[len(before) :].sum()
            theirs, _ = sums(teacher, aligned(ids))
            gap = ours - theirs[0, len(before)]
            # Of the forward KL only the part that depends on the student.
            value = -gap.detach().neg().exp() * ours.detach().exp() * ours if forward else 0.0
            total = total + reach * (value if forward else ours.exp() * gap)
            if len(ids) <= last:
                texts.append(ids)
    return student.gradients(total)


def same(a: dict[tuple[int, ...], Tensor], b: dict[tuple[int, ...], Tensor]) -> None:
    assert any(bool(g.abs().max() > 1e-3) for g in a.values())
    for key in a.keys() | b.keys():
        zero = torch.zeros_like(a.get(key, b.get(key)))  # type: ignore[arg-type]
        close(a.get(key, zero), b.get(key, zero))


CODES = {
    "pairs": (PAIRS, [(2, 2), (2, 3), (3, 2), (3, 3)]),
    "unequal": (["a", "ba", "bb"], [(2,), (3, 2), (3, 3)]),
}


@pytest.mark.parametrize("loss", [k2, policy_gradient_kl, k3])
@pytest.mark.parametrize("code", CODES)
def test_letters_under_a_merging_teacher(code: str, loss: Callable[..., Tensor]) -> None:
    """The expected gradient is that of the chunks' KL, reverse for k2 and policy gradient."""
    pieces, words = CODES[code]
    teacher_tokens = greedy([*pieces, *({"a", "b"} - set(pieces))])
    aligned = align(LETTERS, teacher_tokens)
    student, teacher = Model([2, 3], 1), Model(range(len(teacher_tokens)), 2)  # type: ignore[arg-type]
    texts = list(itertools.product([2, 3], repeat=4))
    got = expected(student, teacher, texts, aligned, loss, last=2)
    same(got, chunk_kl(student, teacher, aligned, words, 2, forward=loss is k3))


@pytest.mark.parametrize("loss", [k2, policy_gradient_kl, k3])
def test_a_merging_student_under_a_teacher_of_letters(loss: Callable[..., Tensor]) -> None:
    pairs = greedy(PAIRS)
    first, later = range(3, 7), range(7, 11)  # at the start of a text, and within it
    aligned = align(pairs, LETTERS)
    student, teacher = Model([*first, *later], 3), Model([2, 3], 4)
    texts = [(i, j) for i in [*first, *later] for j in [*first, *later]]
    got = expected(student, teacher, texts, aligned, loss, last=1)
    words = [(i,) for i in [*first, *later]]
    same(got, chunk_kl(student, teacher, aligned, words, 1, forward=loss is k3))


def test_the_gaps_of_a_text_add_up_to_that_of_the_whole_text() -> None:
    """With merges that depend on what follows, end tokens, and cut texts."""
    merging = by_hand(["a", "b", "ab", "aba"], [("a", "b"), ("ab", "a")])
    aligned = align(LETTERS, merging)
    student, teacher = Model([2, 3, END], 5), Model([2, 3, 4, 5, END], 6)
    for length in range(1, 6):
        for text in itertools.product([2, 3], repeat=length):
            for ids in text, (*text, END):
                one, logprobs = aligned(ids), student.logprobs(ids)[None].detach()
                theirs, places = sums(teacher, one)
                gap = teacher_beside(theirs, logprobs, places) - logprobs
                whole = teacher.logprobs(one.teacher_ids.tolist()).sum() - logprobs.sum()
                close(chunk_share(gap, places).sum(), whole.detach())


def offsets(spread: bool) -> tuple[Tensor, Tensor]:
    """TRRD's gradients of a letter that decides a pair, and of a merging student's pair.

    The second letter is certain: log pi = 0, with no gradient.
    """
    choice = f64([math.log(0.4)]).requires_grad_()
    teacher, places = f64([[math.log(0.25)] * 2]), torch.tensor([[0, 1]])
    letters = torch.stack([choice[0], f64(0.0)])[None]
    beside = teacher_beside(teacher, letters, places)
    if spread:
        beside = letters.detach() + (beside - letters.detach()) / 2
    out = []
    for logprobs, theirs in (letters, beside), (choice[None], teacher[:, :1]):
        loss = trrd_surrogate(logprobs, logprobs.detach(), theirs, f64([1.0])).sum()
        out.append(torch.autograd.grad(loss, choice)[0])
    return out[0], out[1]


def test_every_token_of_a_chunk_carries_the_whole_offset() -> None:
    """A student that writes a pair in two tokens, the second certain, is pushed as by one token.

    Spreading the offset over the tokens, so that the ratios multiply to the chunk's, is not.
    """
    close(*offsets(spread=False))
    assert abs(float(offsets(spread=True)[0] - offsets(spread=True)[1])) > 0.05


def test_a_chunk_counts_once_and_pushes_each_token() -> None:
    places = torch.tensor([[0, 1, 2, 0, -1, 0], [0, 1, 0, 0, 0, 0]])
    assert chunk_sizes(places).tolist() == [[3, 3, 3, 1, 1, 1], [2, 2, 1, 1, 1, 1]]
    logprobs = normal(2, 6, seed=1).requires_grad_()
    teacher = chunk_totals(normal(2, 6, seed=2), places)
    delta = teacher - chunk_totals(logprobs, places).detach()
    loss = chunk_share(k2(logprobs, teacher_beside(teacher, logprobs, places)), places)
    close(loss, 0.5 * delta**2 / chunk_sizes(places))
    close(torch.autograd.grad(loss.sum(), logprobs)[0], -delta)
    mask = torch.ones(2, 6, dtype=torch.bool)
    assert whole_chunks(mask, places).tolist() == [[True] * 4 + [False, True], [True] * 6]
    mask[0, 1] = mask[1, 2] = False
    assert whole_chunks(mask, places)[0].tolist() == [False] * 3 + [True, False, True]
    assert whole_chunks(mask, None) is mask


def test_chunks_of_one_token_change_no_bit() -> None:
    values, places = normal(3, 7, seed=3).float(), torch.zeros(3, 7, dtype=torch.long)
    logprobs = normal(3, 7, seed=4).float().requires_grad_()
    assert torch.equal(teacher_beside(values, logprobs, places), values)
    (plain,) = torch.autograd.grad(k3(logprobs, values).sum(), logprobs)
    shared = chunk_share(k3(logprobs, values), places)
    assert torch.equal(shared, k3(logprobs, values))
    assert torch.equal(torch.autograd.grad(shared.sum(), logprobs)[0], plain)
