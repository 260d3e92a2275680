r"""Compares numbers with units: ``5\text{ cm}`` equals ``50 mm``, but not ``5 m``.

math-verify would drop the units, so that 5 cm equals 5 m.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from kdrl_lightning.rewards.answers.numbers import read_number, same_number

# Unit names by dimension, with the unit's size in the dimension's first unit.
_TABLE = {
    "length": {"m meter metre": "1", "mm millimeter millimetre": "1/1000"}
    | {"cm centimeter centimetre": "1/100", "km kilometer kilometre": "1000"}
    | {"in inch inche": "127/5000", "ft foot feet": "381/1250", "mi mile": "201168/125"},
    "mass": {"g gram": "1", "mg milligram": "1/1000", "kg kilogram": "1000", "t tonne": "1000000"},
    "time": {"s sec second": "1", "ms millisecond": "1/1000", "min minute": "60"}
    | {"h hr hour": "3600", "day": "86400", "week": "604800"},
    "volume": {"l L liter litre": "1", "ml mL milliliter millilitre": "1/1000"},
    "money": {"dollar": "1", "cent": "1/100"},
}
UNITS = {
    name: (dimension, Fraction(size))
    for dimension, sizes in _TABLE.items()
    for names, size in sizes.items()
    for name in names.split()
}
NAME = r"([A-Za-z]+(?:/[A-Za-z]+)?)\.?"
STYLED = rf"\\(?:text|textrm|mathrm|mbox|operatorname|rm)\s*\{{\s*{NAME}\s*\}}"
ENDING = re.compile(rf"(.*?\S)(?:[\s~]|\\[,;: ])*(?:{STYLED}|(?<=\d) {NAME})(?:\^\{{?(\d)\}}?)?$")


@dataclass(frozen=True)
class Quantity:
    """A number with a known unit.

    Attributes:
        number: the text before the unit.
        dimension: the measured dimensions, e.g. length over time, and the unit's power.
        size: the unit's size in the dimension's base unit.
    """

    number: str
    dimension: tuple[str, ...]
    size: Fraction


def same_quantity(one: str, other: str) -> bool | None:
    r"""Compare two numbers if at least one has a known unit; None if they cannot be compared.

    A number without a unit is compared with the other's number alone.

    >>> same_quantity(r"5\text{ cm}", "50 mm"), same_quantity("5 cm", "5 m")
    (True, False)
    """
    a, b = _read(one), _read(other)
    if a is None or b is None:
        # Without a unit on one side, only the numbers are compared.
        quantity, text = (a, other) if a is not None else (b, one)
        return None if quantity is None else same_number(quantity.number, text)
    if a.dimension != b.dimension:
        return False
    values = read_number(a.number), read_number(b.number)
    if values[0] is None or values[1] is None:
        # With the same unit, a parser must compare what comes before it.
        return None if a.size == b.size else False
    return values[0].value * a.size == values[1].value * b.size


def _read(text: str) -> Quantity | None:
    found = ENDING.fullmatch(text.strip())
    if found is None:
        return None
    number, styled, plain, power = found.groups()
    if plain is not None and len(plain) == 1 and power:
        return None  # more likely a power of a symbol
    parts = [UNITS.get(n) or UNITS.get(_singular(n)) for n in (styled or plain).split("/")]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    exponent = int(power or 1)
    size = known[0][1] if len(known) == 1 else known[0][1] / known[1][1]
    dimension = (*(name for name, _ in known), str(exponent))
    return Quantity(number, dimension, size**exponent)


def _singular(name: str) -> str:
    return name.lower().removesuffix("s") if len(name) > 2 else name
