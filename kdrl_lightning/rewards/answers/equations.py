r"""Reads equations as answers: ``x = 5`` and ``2 + 3 = 5`` mean 5; ``3 = 5`` contradicts itself."""

from __future__ import annotations

import re

from kdrl_lightning.rewards.answers.numbers import same_number

EQUALS = re.compile(r"(?<![<>!:=])=(?!=)|\\approx(?![A-Za-z])")
# Commands that may occur in a number. A side with any other letter is not a number.
NUMERIC = re.compile(
    r"\\(?:[dt]?frac|sqrt|times|cdot|div|pi|pm|left|right|circ|infty|[!,;:%$ ])(?![A-Za-z])"
    r"|\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|[eE](?=[+-]?\d)"
)
# A name between two equals signs: x, S_{10}, f(2).
MIDDLE = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([^()]*\))?")


def numeric_sides(text: str) -> list[str]:
    """Return the numeric sides of an equation; an empty list if the text is not one equation.

    >>> numeric_sides("x = 2 + 3 = 5"), numeric_sides("5"), numeric_sides("x=1, y=2")
    (['2 + 3', '5'], [], [])
    """
    sides = [side.strip() for side in EQUALS.split(text)]
    if len(sides) < 2 or any(side.count("(") != side.count(")") for side in sides):
        return []
    if any(re.search(r",(?!\d{3})|\\(?:text|mbox)\s*\{\s*(?:or|and)\b", side) for side in sides):
        return []
    if any(not MIDDLE.fullmatch(side) and not _is_number(side) for side in sides[1:-1]):
        return []  # two equations
    return [side for side in sides if _is_number(side)]


def _is_number(side: str) -> bool:
    digits = re.search(r"\d|\\pi|\\infty", side)
    return bool(digits) and not re.search(r"[A-Za-z\\]", NUMERIC.sub("", side))


def contradicts(sides: list[str]) -> bool:
    """Check whether an equation's sides are numbers that differ from each other."""
    return any(same_number(sides[0], side) is False for side in sides[1:])
