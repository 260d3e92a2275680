"""Chunks of a teacher with another tokenizer, by enumeration of all texts of small alphabets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from helpers.enumerated import END, Model, align, sums
from helpers.reference import close, f64, normal
from helpers.small_tokenizers import SPECIAL, by_hand, wrapped
from kdrl_lightning.losses import k2, k3, policy_gradient_kl, trrd_surrogate
from kdrl_lightning.losses.teacher_chunks import (
    chunk_share,
    chunk_sizes,
    chunk_totals,
    teacher_beside,
    whole_chunks,
)
from kdrl_lightning.teachers.cross_tokenizer import Chunked


def greedy(pieces: Sequence[str]) -> object:
    """A tokenizer that takes the longest piece from left to right, as WordPiece does."""
    names = [*SPECIAL, *pieces, *(f"##{p}" for p in pieces)]
    made = Tokenizer(models.WordPiece({t: i for i, t in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return wrapped(made)


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


# Characters, and the words that a teacher makes of them: no word begins another one. ``Ġ`` is a
# space.
CODES = {
    "pairs": ("ab", PAIRS),
    "unequal": ("ab", ["a", "ba", "bb"]),
    "digits in pairs": ("07", ["00", "07", "70", "77"]),
    "a space begins a word": ("Ġx", ["Ġx", "ĠĠ", "x"]),
    "three letters": ("abc", ["a", "b", "ca", "cb", "cc"]),
    "long words": ("ab", ["b", "ab", "aab", "aaa"]),
}


@pytest.mark.parametrize("loss", [k2, policy_gradient_kl, k3])
@pytest.mark.parametrize("code", CODES)
def test_letters_under_a_merging_teacher(code: str, loss: Callable[..., Tensor]) -> None:
    """The expected gradient is that of the chunks' KL, reverse for k2 and policy gradient."""
    letters, pieces = CODES[code]
    ids = {letter: n + 2 for n, letter in enumerate(letters)}
    teacher_tokens = greedy([*pieces, *sorted(set(letters) - set(pieces))])
    aligned = align(by_hand(letters), teacher_tokens)
    student, teacher = Model([*ids.values()], 1), Model(range(len(teacher_tokens)), 2)  # type: ignore[arg-type]
    longest = max(map(len, pieces))
    last = 1 if longest > 2 or len(letters) > 2 else 2  # a chunk that begins here is whole
    texts = list(itertools.product(ids.values(), repeat=last + longest))
    got = expected(student, teacher, texts, aligned, loss, last)
    words = [tuple(ids[letter] for letter in piece) for piece in pieces]
    same(got, chunk_kl(student, teacher, aligned, words, last, forward=loss is k3))


@pytest.mark.parametrize("loss", [k2, policy_gradient_kl, k3])
@pytest.mark.parametrize(
    ("letters", "pieces"),
    [("ab", PAIRS), ("07", CODES["digits in pairs"][1]), ("Ġx", CODES["a space begins a word"][1])],
    ids=["letters", "digits", "spaces"],
)
def test_a_merging_student_under_a_teacher_of_letters(
    letters: str, pieces: list[str], loss: Callable[..., Tensor]
) -> None:
    count = len(pieces)
    first, later = range(3, 3 + count), range(3 + count, 3 + 2 * count)  # of a text, and within it
    aligned = align(greedy(pieces), by_hand(letters))
    student, teacher = Model([*first, *later], 3), Model([2, 3], 4)
    texts = [(i, j) for i in [*first, *later] for j in [*first, *later]]
    got = expected(student, teacher, texts, aligned, loss, last=1)
    words = [(i,) for i in [*first, *later]]
    same(got, chunk_kl(student, teacher, aligned, words, 1, forward=loss is k3))


def test_the_gaps_of_a_text_add_up_to_that_of_the_whole_text() -> None:
    """With merges that depend on what follows, end tokens, and cut texts."""
    merging = by_hand(["a", "b", "ab", "aba"], [("a", "b"), ("ab", "a")])
    aligned = align(by_hand("ab"), merging)
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
