"""majority@k: the probability that the most frequent answer of k completions is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import comb

import torch
from torch import Tensor

from kdrl_lightning.evaluation.pass_at_k import check_k


def majority_at_k(answers: Tensor, correct: Tensor, k: int) -> Tensor:
    """Return majority@k of each prompt (self-consistency, Wang et al., arXiv 2203.11171).

    The value is the exact expectation over all subsets of k of the n completions, by counting.
    Completions without an answer do not vote; if none votes, the prompt counts as wrong. A tie goes
    to the answer that was given first. Over all orders of a subset, each tied answer comes first
    equally often, so each gets an equal share. An answer's correctness is the mean of its
    completions' verdicts, which normally agree.

    >>> majority_at_k(torch.tensor([[0, 0, 1]]), torch.tensor([[True, True, False]]), k=3)
    tensor([1.], dtype=torch.float64)

    Args:
        answers: ``[P, n]`` int64; equal numbers are equal answers of a prompt, -1 is no answer.
        correct: ``[P, n]`` bool.
        k: number of completions that vote, from 1 to n.

    Returns:
        ``[P]`` float64.

    Raises:
        ValueError: k is not from 1 to n.
    """
    check_k(k, answers.shape[1])
    rows = zip(answers.tolist(), correct.tolist(), strict=True)
    return torch.tensor([_majority(a, c, k) for a, c in rows], dtype=torch.float64)


def _majority(answers: Sequence[int], correct: Sequence[bool], k: int) -> float:
    votes = Counter(answers)
    silent = votes.pop(-1, 0)
    right = Counter(a for a, c in zip(answers, correct, strict=True) if c and a >= 0)
    total = 0.0
    for answer, hits in right.items():
        others = tuple(sorted(v for a, v in votes.items() if a != answer))
        total += hits / votes[answer] * win_share(votes[answer], others, silent, k)
    return total


@lru_cache(maxsize=65536)
def win_share(votes: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """Return the probability that an answer wins the vote of k completions.

    The k completions are drawn without replacement. For each number j of the answer's votes, the
    function counts the subsets in which no other answer has more votes; if t other answers also
    have j, the answer wins with probability 1 / (t + 1).

    >>> win_share(1, (1,), 0, 2), win_share(2, (1,), 0, 2)
    (0.5, 0.6666666666666666)

    Args:
        votes: number of completions with the answer.
        others: number of completions with each other answer.
        silent: number of completions without an answer.
        k: number of drawn completions.
    """
    share = 0.0
    subsets = comb(votes + sum(others) + silent, k)
    for j in range(1, min(votes, k) + 1):
        ways: dict[tuple[int, int], int] = {
            (s, 0): comb(silent, s) for s in range(min(silent, k - j) + 1)
        }
        for other in others:
            ways = _with_another(ways, other, j, k - j)
        for (drawn, tied), count in ways.items():
            if drawn == k - j:
                share += comb(votes, j) * count / subsets / (tied + 1)
    return share


def _with_another(
    ways: dict[tuple[int, int], int], votes: int, most: int, room: int
) -> dict[tuple[int, int], int]:
    """Extend the counts by another answer, which gets at most ``most`` of the drawn votes."""
    out: Counter[tuple[int, int]] = Counter()
    for (drawn, tied), count in ways.items():
        for i in range(min(votes, most, room - drawn) + 1):
            out[drawn + i, tied + (i == most)] += count * comb(votes, i)
    return out
