"""Every text of small alphabets under two tokenizers: losses and gradients by the formulas alone.

The alphabets have merges that overlap, characters of several bytes, of which a student may sample
half, words that begin with a space, and digits in pairs. Both sides may merge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor

from helpers.enumerated import END, Model, align, sums
from helpers.objective_steps import MAX_TOKENS, ready
from helpers.reference import close, f64
from helpers.small_tokenizers import by_hand, wrapped
from kdrl_lightning.losses.teacher_chunks import teacher_beside
from kdrl_lightning.objectives import KDRL, RLAD, OnPolicyDistillation, TokenScores
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers.cross_tokenizer import TokenBytes


def digits_in_pairs() -> Any:
    """As Qwen's and Llama 3's pre-tokenizers cut numbers, here after two digits."""
    pairs = [("1", "2"), ("2", "1"), ("2", "2")]
    made = Tokenizer.from_str(
        by_hand([*"12", *(a + b for a, b in pairs)], pairs).backend_tokenizer.to_str()
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return wrapped(made)


AAB = [("a", "a"), ("aa", "b"), ("a", "b"), ("ab", "a")]
BAB = [("b", "a"), ("ba", "b")]
E_ACUTE = [("Ã", "©"), ("a", "Ã©")]
SPACED = [("Ġ", "x"), ("x", "Ġx"), ("Ġ", "Ġ")]


def merging(letters: str, merges: list[tuple[str, str]]) -> Any:
    return by_hand([*letters, *(a + b for a, b in merges)], merges)


# Pairs of tokenizers: plain characters or bytes, and merges of them.
PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "aab, aba": (lambda: by_hand("ab"), lambda: merging("ab", AAB)),
    "bab": (lambda: by_hand("ab"), lambda: merging("ab", BAB)),
    "both merge": (lambda: merging("ab", AAB[:2]), lambda: merging("ab", BAB)),
    "two bytes": (lambda: by_hand("aÃ©"), lambda: merging("aÃ©", E_ACUTE)),
    "spaces": (lambda: by_hand("xĠ"), lambda: merging("xĠ", SPACED)),
    "digits": (lambda: by_hand("12"), digits_in_pairs),
}
LENGTHS = {2: 4, 3: 3, 4: 2, 5: 2, 6: 2}  # of the longest text, by the student's number of tokens


class Case(NamedTuple):
    """All texts of a student with their scores, and the pieces that both tokenizers write."""

    batch: RolloutBatch
    ours: list[list[bytes]]
    theirs: list[list[bytes]]
    their_logprobs: list[list[float]]


def written(known: TokenBytes, ids: Sequence[int]) -> list[bytes]:
    """The end token as a byte that no other token has."""
    return [b"\0" if i == END else known.pieces[i] or b"" for i in ids]


@cache
def case(name: str, reverse: bool) -> Case:
    student, teacher = PAIRS[name][::-1] if reverse else PAIRS[name]
    known, other = (TokenBytes(made(), "x", [END]) for made in (student, teacher))
    plain = [i for i, piece in enumerate(known.pieces) if piece]
    model = Model([*plain, END], 7)
    theirs = Model([*(i for i, piece in enumerate(other.pieces) if piece), END], 8)
    aligned = align(student(), teacher())
    texts = [
        (*ids, *end)
        for n in range(LENGTHS[len(plain)] + 1)
        for ids in itertools.product(plain, repeat=n)
        for end in ((), (END,))
        if n or end
    ]
    rows = [aligned(ids) for ids in texts]
    tables = [sums(theirs, one) for one in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = collate([[9]] * len(texts), list(map(list, texts)), [0] * len(texts), pad_id=0)
    own = [model.logprobs(ids).detach() for ids in texts]
    batch = batch.replace(
        rewards=torch.arange(len(texts), dtype=torch.float64) % 7,
        old_logprobs=pad(own, batch_first=True),
        teacher_logprobs=pad([t[0] for t, _ in tables], batch_first=True),
        chunk_places=pad([p[0] for _, p in tables], batch_first=True, padding_value=-1),
    )
    return Case(
        batch,
        [written(known, ids) for ids in texts],
        [written(other, one.teacher_ids.tolist()) for one in rows],
        [theirs.logprobs(one.teacher_ids.tolist()).tolist() for one in rows],
    )


def ends(pieces: list[bytes]) -> list[int]:
    return list(itertools.accumulate(map(len, pieces)))


def gaps(one: Case, row: int) -> list[tuple[float, int]]:
    """By bytes alone: the gap of each token's chunk, and the chunk's number of tokens."""
    ours, theirs = ends(one.ours[row]), ends(one.theirs[row])
    assert b"".join(one.ours[row]) == b"".join(one.theirs[row])
    shared = sorted(set(ours) & set(theirs))
    number = [next(n for n, at in enumerate(shared) if end <= at) for end in ours]
    other = [next(n for n, at in enumerate(shared) if end <= at) for end in theirs]
    logprobs = one.batch.old_logprobs[row].tolist()  # type: ignore[index]
    out = []
    for mine in number:
        total = sum(v for v, n in zip(one.their_logprobs[row], other, strict=True) if n == mine)
        total -= sum(v for v, n in zip(logprobs, number, strict=False) if n == mine)
        out.append((total, number.count(mine)))
    return out


SIDES = [(name, reverse) for name in PAIRS for reverse in (False, True)]
KINDS = [f"{name}, {'merging student' if reverse else 'plain student'}" for name, reverse in SIDES]
BETA, HIGH = 0.3, 0.2
SETTINGS: dict[str, Any] = {"reduction": "constant_length", "engine_correction": None}


def slope(estimator: str, gap: float) -> float:
    """Derivative of a chunk's KL estimate by each of its log-probabilities."""
    return 1.0 - math.exp(gap) if estimator == "k3" else -gap


def pushed(advantage: float, ratio: float) -> float:
    """Derivative of the clipped surrogate at rho = 1."""
    dead = ratio > 1 + HIGH if advantage > 0 else ratio < 1 - HIGH
    return 0.0 if dead else -advantage * ratio


def derivatives(objective: Any, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """``[B, T]`` derivatives of the summed loss by each log-probability, and the advantages."""
    made = ready(objective, batch)
    logprobs = batch.old_logprobs.clone().requires_grad_()  # type: ignore[union-attr]
    loss, _ = objective(made, TokenScores(logprobs, None))
    (found,) = torch.autograd.grad(loss, logprobs)
    advantages = made.advantages
    if advantages is None:
        advantages = torch.zeros(len(batch), dtype=torch.float64)
    return found * len(batch) * MAX_TOKENS, advantages


def compare(one: Case, objective: Any, formula: Callable[[float, float], float]) -> None:
    """Check each token against ``formula(advantage, gap of its chunk)``."""
    found, advantages = derivatives(objective, one.batch)
    expected = torch.zeros_like(found)
    for row in range(len(one.batch)):
        advantage = float(advantages[row].flatten()[0])
        for t, (gap, _) in enumerate(gaps(one, row)):
            expected[row, t] = formula(advantage, gap)
    assert expected.abs().max() > 0.1
    close(found, expected)


@pytest.mark.parametrize(("name", "reverse"), SIDES, ids=KINDS)
def test_the_gap_of_each_token_is_its_chunks_by_bytes(name: str, reverse: bool) -> None:
    one = case(name, reverse)
    old, places = one.batch.old_logprobs, one.batch.chunk_places
    beside = teacher_beside(one.batch.teacher_logprobs, old, places)  # type: ignore[arg-type]
    several = 0
    for row in range(len(one.batch)):
        expected = gaps(one, row)
        found = (beside - old)[row, : len(expected)]  # type: ignore[operator]
        close(found, [gap for gap, _ in expected])
        whole = sum(gap / size for gap, size in expected)
        ours = float(old[row].sum())  # type: ignore[index]
        assert whole == pytest.approx(sum(one.their_logprobs[row]) - ours, abs=1e-10)
        several += sum(size > 1 for _, size in expected)
    assert several > 0 or name == "both merge" or reverse


@pytest.mark.parametrize("estimator", ["k2", "k3", "policy_gradient"])
@pytest.mark.parametrize(("name", "reverse"), SIDES, ids=KINDS)
def test_gradients_of_the_kl_and_of_kdrl(name: str, reverse: bool, estimator: str) -> None:
    one = case(name, reverse)
    alone = OnPolicyDistillation(1.0, kl_estimator=estimator, **SETTINGS)
    compare(one, alone, lambda _, gap: slope(estimator, gap))
    both = KDRL(BETA, kl_estimator=estimator, **SETTINGS)
    compare(one, both, lambda advantage, gap: -advantage + BETA * slope(estimator, gap))


@pytest.mark.parametrize("clamp", [None, 0.4])
@pytest.mark.parametrize(("name", "reverse"), SIDES, ids=KINDS)
def test_gradients_of_rlad(name: str, reverse: bool, clamp: float | None) -> None:
    one, alpha = case(name, reverse), 0.25

    def formula(advantage: float, gap: float) -> float:
        offset = gap if clamp is None else max(-clamp, min(gap, clamp))
        return pushed(advantage, math.exp(-(1 - alpha) * offset))

    objective = RLAD(trrd_alpha=alpha, offset_clamp=clamp, log_ratio_clamp=None, **SETTINGS)
    compare(one, objective, formula)


@pytest.mark.parametrize(("name", "reverse"), SIDES, ids=KINDS)
def test_a_chunks_kl_counts_once(name: str, reverse: bool) -> None:
    """The value of k2 over a text is the sum over its chunks, not over its tokens."""
    one = case(name, reverse)
    objective = OnPolicyDistillation(1.0, kl_estimator="k2", **SETTINGS)
    made = ready(objective, one.batch)
    loss, _ = objective(made, TokenScores(one.batch.old_logprobs, None))
    parts = [0.5 * gap**2 / size for row in range(len(one.batch)) for gap, size in gaps(one, row)]
    close(loss, f64(sum(parts) / len(one.batch) / MAX_TOKENS))
