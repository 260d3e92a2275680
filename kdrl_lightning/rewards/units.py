r"""Units of measurement behind a number: ``5\text{ cm}`` is ``50 mm``, and never ``5 m``.

math-verify drops every unit, so that 5 cm equals 5 m.
"""

from __future__ import annotations

import re
from fractions import Fraction

from kdrl_lightning.rewards.numbers import read_number

# Names by dimension, with their size in the dimension's first unit.
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
STYLED = r"\\(?:text|textrm|mathrm|mbox|operatorname|rm)\s*\{\s*([A-Za-z]+)\.?\s*\}"
ENDING = re.compile(
    rf"(.*?\S)(?:[\s~]|\\[,;: ])*(?:{STYLED}|(?<=\d) ([A-Za-z]+)\.?)(?:\^\{{?(\d)\}}?)?$"
)


def same_quantity(one: str, other: str) -> bool | None:
    r"""Compare two numbers with units that are known; None if one of the texts has none.

    >>> same_quantity(r"5\text{ cm}", "50 mm"), same_quantity("5 cm", "5 m")
    (True, False)
    """
    a, b = _split(one), _split(other)
    if a is None or b is None:
        return None
    if a[1] != b[1]:
        return False
    values = read_number(a[0]), read_number(b[0])
    if values[0] is None or values[1] is None:
        # The same unit: what stands before it decides.
        return None if a[2] == b[2] else False
    return values[0].value * a[2] == values[1].value * b[2]


def _split(text: str) -> tuple[str, tuple[str, int], Fraction] | None:
    """Return the number, dimension and power, and the unit's size; None without a known unit."""
    found = ENDING.fullmatch(text.strip())
    if found is None:
        return None
    number, styled, plain, power = found.groups()
    name = styled or plain
    known = UNITS.get(name) or UNITS.get(name.lower().removesuffix("s"))
    if known is None:
        return None
    exponent = int(power or 1)
    return number, (known[0], exponent), known[1] ** exponent
