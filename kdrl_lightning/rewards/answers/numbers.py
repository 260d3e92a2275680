r"""Reads numbers exactly, as people write them: ``1.6\times 10^{-19}``, ``50\%``, ``1,000``.

math-verify would round to six decimal places, which makes all tiny numbers equal, and drop percent
signs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LARGEST_EXPONENT, LONGEST = 2000, 1000
# math-verify rounds to this number of places; a shorter decimal does not equal a fraction like 1/3.
FEWEST_PLACES = 6
FLOAT_DIGITS, NOISE = 15, Fraction(1, 10**14)
# Parts of a number that only change its look: spaces and delimiters.
SPACING = re.compile(r"\\[!,;: ]|\\(?:left|right|displaystyle)(?![A-Za-z])|~")
DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
POWER = r"10\s*\^\s*(?:\{\s*([+-]?\d+)\s*\}|([+-]?\d+))"
SCIENTIFIC = re.compile(
    rf"({DECIMAL})(?:[eE]([+-]?\d+)|\s*(?:\\times|\\cdot|\*|×)\s*{POWER})?|{POWER}"
)
FRACTION = re.compile(
    r"\\[dt]?frac\s*(?:\{\s*([+-]?\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s?(\d)\s*(\d))|(\d+)\s*/\s*(\d+)"
)
MIXED = re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)")
REPEATING = re.compile(r"(\d+)\.(\d*)\\overline\s*\{\s*(\d+)\s*\}")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,])")


@dataclass(frozen=True)
class Number:
    """An exact value, and how precisely it was written.

    Attributes:
        value: the number; 50 % is 1/2.
        places: digits after the decimal point; None if it was not written as a decimal.
        digits: significant digits of the decimal.
    """

    value: Fraction
    places: int | None = None
    digits: int = 0


def read_number(text: str) -> Number | None:
    r"""Read an integer, decimal, fraction, power of ten or percentage; None for anything else.

    >>> read_number(r"-1{,}234.50"), read_number(r"12.5\%").value
    (Number(value=Fraction(-2469, 2), places=2, digits=6), Fraction(1, 8))
    """
    if len(text) > LONGEST:
        return None
    text = SPACING.sub(" ", text.replace("{,}", ",").replace("−", "-")).strip().strip("$").strip()
    sign = -1 if text.startswith("-") else 1
    text = text[1:].strip() if text[:1] in "+-" else text
    text = text.removeprefix("\\$").strip()
    text, percent = re.subn(r"\s*\\?%$", "", text)
    text = THOUSANDS.sub(lambda found: re.sub("[, ]", "", found[0]), text)
    number = _decimal(text) or _fraction(text) or _mixed(text) or _repeating(text)
    if number is None:
        return None
    shift = 2 if percent else 0
    places = None if number.places is None else number.places + shift
    return Number(sign * number.value / 10**shift, places, number.digits)


def same_number(one: str, other: str) -> bool | None:
    r"""Compare two numbers; return None if one of the texts is not a number.

    Decimals are compared exactly, unless one has as many digits as a float64, whose last digits are
    rounding noise. A decimal equals a fraction without a finite decimal form (1/3) if it is the
    fraction's value rounded to at least six decimal places.

    >>> same_number("1.6e-19", "9.1e-31"), same_number("1/3", "0.333333"), same_number("x", "1")
    (False, True, None)
    """
    a, b = read_number(one), read_number(other)
    if a is None or b is None:
        return None
    if a.value == b.value:
        return True
    largest = max(abs(a.value), abs(b.value))
    if (_is_float(a) or _is_float(b)) and abs(a.value - b.value) <= NOISE * largest:
        return True
    rounded, whole = (a, b) if a.places is not None else (b, a)
    if rounded.places is None or whole.places is not None:
        return False
    if min(rounded.places, rounded.digits) < FEWEST_PLACES:
        return False
    return abs(rounded.value - whole.value) * 2 <= Fraction(1, 10**rounded.places)


def _is_float(number: Number) -> bool:
    """Check whether a decimal has all digits of a float64, the last of which are noise."""
    return bool(number.places) and number.digits >= FLOAT_DIGITS


def _decimal(text: str) -> Number | None:
    found = SCIENTIFIC.fullmatch(text)
    if found is None:
        return None
    mantissa, *exponents = found.groups()
    exponent = int(next((e for e in exponents if e is not None), 0))
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    mantissa = mantissa or "1"
    after = len(mantissa.partition(".")[2])
    digits = len(mantissa.replace(".", "").lstrip("0"))
    value = Fraction(mantissa.rstrip(".") if mantissa != "." else "0") * Fraction(10) ** exponent
    return Number(value, max(after - exponent, 0), digits)


def _repeating(text: str) -> Number | None:
    found = REPEATING.fullmatch(text)
    if found is None:
        return None
    whole, fixed, again = found.groups()
    below = 10 ** len(fixed) * (10 ** len(again) - 1)
    return Number(Fraction(int(whole + fixed + again) - int(whole + fixed), below))


def _mixed(text: str) -> Number | None:
    found = MIXED.fullmatch(text)
    if found is None:
        return None
    whole, above, below = (int(part) for part in found.groups())
    return Number(Fraction(above, below) + whole) if 0 < above < below else None


def _fraction(text: str) -> Number | None:
    found = FRACTION.fullmatch(text)
    if found is None:
        return None
    above, below = (int(part) for part in found.groups() if part is not None)
    return Number(Fraction(above, below)) if below else None
