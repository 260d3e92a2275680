"""Measures of a completion's text: appeals to a hidden reference, hedging, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Words with which a model takes back or doubts what it wrote (arXiv 2603.24472).
HEDGES = (
    *("wait", "hmm", "perhaps", "maybe", "actually", "alternatively"),
    *("seems", "might", "likely", "check"),
)
# A student that never saw a reference has no reason to write these phrases (our list).
REFERENCES = (
    *("reference answer", "reference solution", "provided answer", "provided solution"),
    *("given answer", "given solution", "expected answer", "answer key", "ground truth"),
    *("according to the solution", "according to the answer", "according to the hint"),
    *("the hint says", "the solution above", "as shown in the solution"),
)
# Length of the n-grams, in tokens, whose repetition is counted.
REPEATED = 8


def count_words(text: str, words: Sequence[str]) -> int:
    """Return how often any of some words occurs in a text, as a whole word in any case.

    >>> count_words("Wait, wait: checking is no check.", HEDGES)
    3
    """
    return len(re.findall(rf"\b(?:{'|'.join(map(re.escape, words))})\b", text, re.IGNORECASE))


def appeals(text: str, prompt: str, phrases: Sequence[str]) -> bool:
    """Return whether a completion uses a phrase that its prompt does not.

    >>> appeals("The reference answer is 4.", "2 + 2 = ?", REFERENCES)
    True
    >>> appeals("The hint says 4.", "2 + 2 = ? The hint says: even.", REFERENCES)
    False
    """
    low, given = text.lower(), prompt.lower()
    return any(phrase.lower() in low and phrase.lower() not in given for phrase in phrases)


def repeated_frac(ids: Sequence[int], length: int = REPEATED) -> float:
    """Return the share of a completion's n-grams that repeat earlier ones, in [0, 1).

    Args:
        ids: token ids.
        length: n, tokens of an n-gram.

    >>> repeated_frac([1, 2, 1, 2, 1], length=2)
    0.5
    >>> repeated_frac([1, 2, 3], length=8)
    0.0
    """
    grams = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
