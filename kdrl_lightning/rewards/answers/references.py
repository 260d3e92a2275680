"""Reads a row's reference answers as texts, whatever type the column has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from fractions import Fraction
from unicodedata import normalize

import numpy as np

from kdrl_lightning.common.untyped import Row, Value
from kdrl_lightning.common.written_values import read_container
from kdrl_lightning.errors import ConfigurationError

ROW_CHARACTERS = 120
# Narrow float types. For each: how many digits its rounded values have at least as a float64 (a
# float64 with fewer digits is a decimal that somebody wrote), how many digits of a decimal survive
# the rounding, and its approximate range.
NARROW = ((np.float32, 15, 6, 1e-37, 1e38), (np.float16, 10, 3, 1e-4, 6e4))
# Invisible characters, which texts from web pages have at their ends.
INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
WIDER = {"longdouble", "float96", "float128"}  # numpy's `item` does not make them Python floats


def accepted(row: Row, column: str = "answer") -> tuple[str, ...]:
    """Return every text that a row accepts as its answer; a completion must match one of them.

    - A text counts as it is, bytes are decoded as UTF-8.
    - A whole float counts with and without its fraction (pandas turns a column of integers with an
      empty cell into floats). A tiny or huge float counts with and without its exponent. A float
      with the rounding error of a sum (0.1 + 0.2) also counts as 0.3, and one that was stored in
      32 or 16 bits (0.10000000149, 0.0999755859375) also as 0.1.
    - A bool counts in both spellings, ``True`` and ``true``.
    - White space at the ends of a text is ignored. The text also counts without invisible
      characters there, and in Unicode's composed form (NFC).
    - A time counts with a space and with a T before the hour; midnight also counts as the date
      alone.
    - Each entry of a list, tuple, set or array counts; missing entries are skipped.

    Args:
        row: the prompt's row.
        column: the row's column with the answer.

    Returns:
        At least one text, none of them empty; the first text of a number has no exponent.

    Raises:
        KeyError: the row has no such column.
        ConfigurationError: the answer is missing (None, NaN, an empty text or list), or its type
            is not supported.

    >>> accepted({"answer": 72.0}), accepted({"answer": ["yes", "y"]}), accepted({"answer": " 7 "})
    (('72', '72.0'), ('yes', 'y'), ('7',))
    """
    value = row[column]
    try:
        texts = list(dict.fromkeys(_texts(value)))
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"{str(error).splitlines()[0]} ({_one_line(value):.60}) in the row {shorten(row)}"
        raise ConfigurationError(
            f"`{column}` must be a text, a number, or a list of them: got {found}. Name a nested "
            "column with a dot (outer.inner), or convert the value."
        ) from error
    if not texts:
        raise ConfigurationError(
            f"a row must have an answer, but its `{column}` is empty: got "
            f"{_one_line(value):.40} in the row {shorten(row)}. Add the answer, or remove the row."
        )
    return tuple(texts)


def missing(value: object) -> bool:
    """Check whether a value is missing: None, NaN, pandas' NA or NaT, or an empty text."""
    if value is None or (isinstance(value, np.ma.MaskedArray) and not value.ndim and value.mask):
        return True
    if isinstance(value, str | bytes):
        return not value.strip()
    try:
        return bool(value != value)
    # NA and arrays cannot be converted to bool; a signaling NaN cannot be compared.
    except (TypeError, ValueError, RuntimeError, ArithmeticError):
        return type(value).__name__ == "NAType" or isinstance(value, Decimal)


def list_as_text(row: Row, column: str = "answer") -> str | None:
    """Return a row's answer if it is a flat list or a dict written as text; else None.

    >>> list_as_text({"answer": "['72', '73']"}), list_as_text({"answer": "72"})
    ("['72', '73']", None)
    """
    value = row.get(column)
    found = read_container(value) if isinstance(value, str) else None
    if isinstance(found, list) and any(isinstance(entry, list) for entry in found):
        return None  # a matrix; no list of accepted answers has lists in it
    return None if found is None else str(value).strip()


def shorten(row: Row, limit: int = ROW_CHARACTERS) -> str:
    """Return a row as text for a message, cut after ``limit`` characters."""
    text = _one_line(dict(row))
    return text if len(text) <= limit else text[:limit] + "..."


def _one_line(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or a user's class
        text = f"a {type(value).__name__} that cannot be printed"
    return re.sub(r"\s*\n\s*", " ", text)


def _texts(value: object, inside: bool = False) -> Iterable[str]:
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    if isinstance(value, Mapping) or (inside and _many(value)):
        raise TypeError(f"a {type(value).__name__}{' inside a list' if inside else ''}")
    if _many(value):
        return [text for entry in _entries(value) for text in _texts(entry, inside=True)]
    if missing(value):
        return []
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        shown = value.strip().strip(INVISIBLE).strip()
        return [value.strip(), shown, normalize("NFC", shown)]
    if hasattr(value, "item") and hasattr(value, "dtype"):  # numpy's or torch's scalar
        return _texts(_scalar(value), inside)
    if isinstance(value, bool):
        return [str(value), str(value).lower()]
    if isinstance(value, float):
        texts = _of_decimal(Decimal(repr(value)), repr(value))
        if value.is_integer():  # no rounding error: 2**53 must not match 9007199254740990
            return texts
        short = Decimal(f"{value:.15g}")
        return [*texts, *_of_decimal(short, str(short))[:1], *_of_single(value)]
    if isinstance(value, Decimal):
        return _of_decimal(value, str(value))
    if isinstance(value, datetime):
        midnight = value.time() == time() and value.tzinfo is None
        dates = [str(value.date())] if midnight else []
        return [str(value), value.isoformat(), *dates]
    if isinstance(value, int | complex | Fraction | date | time):
        return [str(value)]
    raise TypeError(f"a {type(value).__name__}")


def _of_decimal(value: Decimal, text: str) -> list[str]:
    if not value.is_finite():
        sign = "-" if value < 0 else ""
        return [sign + "inf", sign + "\\infty", text]
    plain = format(value, "f")
    short = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return [short, plain, text, *([] if value else ["0"])]


def _of_single(value: float) -> list[str]:
    """Return the short text of a value that was stored as float32 or float16; else no text."""
    for kind, fewest, kept, smallest, largest in NARROW:
        if _digits(value) < fewest or not smallest <= abs(value) < largest:
            continue
        single = kind(value)
        if float(single) == value and _digits(single) <= kept:
            short = Decimal(str(single))
            return _of_decimal(short, str(short))[:1]
    return []


def _digits(value: object) -> int:
    return len(Decimal(str(value)).normalize().as_tuple().digits)


def _many(value: object) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return True
    return hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0  # an array, a series


def _entries(value: Value) -> list[Value]:
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    return list(value)


def _scalar(value: Value) -> Value:
    kind = str(value.dtype).removeprefix("torch.")
    if kind.startswith(("datetime64[", "timedelta64[", "void", "[", "{")):
        return _time(value)
    whole = value.item()
    if kind in WIDER:
        return float(whole)
    if isinstance(whole, float) and kind != "float64" and not whole.is_integer():
        return _shortest(value, whole)
    return str(value) if kind == "complex64" and isinstance(value, np.generic) else whole


def _shortest(value: Value, whole: float) -> float:
    """Return the shortest decimal that a narrow type can distinguish: 0.1, not 0.10000000149."""
    short = (float(f"{whole:.{digits}g}") for digits in range(1, 18))
    one = value.new_tensor if hasattr(value, "new_tensor") else value.dtype.type
    return next((number for number in short if float(one(number)) == whole), whole)


def _time(value: Value) -> Value:
    """Convert a time of numpy to Python's type, or to text if that type cannot express it.

    Python's times have no nanoseconds, and no month without a day.

    Raises:
        TypeError: it is a duration, or several values in one.
    """
    if value.dtype.kind != "M":
        raise TypeError(f"a {type(value).__name__}")
    unit = np.datetime_data(value.dtype)[0]
    exact = value.astype("datetime64[us]")
    if unit in ("Y", "M", "W", "D") or exact != value:
        return str(value)
    return exact.item()
