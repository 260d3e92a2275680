"""Parses lists and dicts that were stored as text, e.g. in a CSV file.

It understands JSON, Python's ``repr``, and what numpy, torch and pandas print.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

# `Any` in this file: what a text may hold.

TOKEN = re.compile(
    r"""\s*(?:(?P<text>[bBuUrR]{0,2}(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))"""
    r"""|(?P<open>[A-Za-z_][\w.]*\(|[(\[{])|(?P<close>[)\]}])|(?P<mark>[,:=])"""
    r"""|(?P<word>[^\s,:=()\[\]{}'"]+))""",
    re.S,
)
CLOSING = {"(": ")", "[": "]", "{": "}"}
# Calls that may wrap a printed value; their other arguments (dtype=object) are ignored.
CALLS = re.compile(
    r"(?:(?:np|numpy)\.)?(?:array|ndarray|str_|bool_?|u?int\d*|float\d*|longdouble)"
    r"|(?:torch\.)?tensor|set|frozenset|list|tuple|Decimal"
)
WORDS: dict[str, Any] = {"True": True, "true": True, "False": False, "false": False}
WORDS |= {"None": None, "null": None, "nan": None, "NaN": None, "<NA>": None}
WORDS |= {"inf": float("inf"), "Infinity": float("inf"), "-inf": float("-inf")}
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")


def read_container(text: str) -> list[Any] | dict[Any, Any] | None:
    r"""Return the list or dict that a text shows; None if that is empty, or the text shows neither.

    Tuples, sets and arrays become lists. A number that a float would write differently (007, 1.50)
    stays text.

    >>> read_container("['72', '73']"), read_container("['72' '73']"), read_container("(1, 2.5)")
    (['72', '73'], ['72', '73'], [1, 2.5])
    >>> read_container('{"ground_truth": "72"}'), read_container("array(['a'], dtype=object)")
    ({'ground_truth': '72'}, ['a'])
    >>> read_container("(72)"), read_container("[x, y]"), read_container("[0, 1)")
    (None, None, None)
    """
    text = text.strip()
    if text[-1:] not in (")", "]", "}") or not (text[0] in "([{" or CALLS.match(text)):
        return None
    try:
        value = json.loads(text, parse_float=_number, parse_int=_number)
    except (ValueError, RecursionError):
        value = _Reader(text).read()
    return value if isinstance(value, list | dict) and value else None


class _Reader:
    """Reads one value by recursive descent."""

    def __init__(self, text: str) -> None:
        self.tokens = [*_tokens(text), ("end", "")]
        self.at = 0

    def read(self) -> Any:
        """Return the value; None if the whole text is not one value."""
        try:
            value = self._value()
            return value if self.tokens[self.at][0] == "end" else None
        except (ValueError, SyntaxError, TypeError, RecursionError):
            return None

    def _next(self) -> tuple[str, str]:
        self.at += 1
        return self.tokens[self.at - 1]

    def _value(self) -> Any:
        kind, token = self._next()
        if kind == "text":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an invalid escape such as \d, which Python keeps
                found = ast.literal_eval(token)
            return found.decode() if isinstance(found, bytes) else found
        if kind == "word":
            return WORDS[token] if token in WORDS else _number(token)
        if kind != "open":
            raise ValueError(f"no value begins with {token!r}")
        return self._call(token[:-1]) if len(token) > 1 else self._items(token)

    def _call(self, name: str) -> Any:
        if not CALLS.fullmatch(name):
            raise ValueError(f"an unknown name {name!r}")
        value = self._value()
        while (token := self._next()) != ("close", ")"):
            if token[0] not in ("mark", "word"):
                raise ValueError("a call must end after its arguments")
        return value

    def _items(self, opened: str) -> Any:
        """Read what follows an opening bracket; only numpy's lists have no commas."""
        keys: list[Any] = []
        values: list[Any] = []
        commas = 0
        while self.tokens[self.at] != ("close", CLOSING[opened]):
            if commas < len(values):
                if self.tokens[self.at] == ("mark", ","):
                    self.at += 1
                elif opened != "[":
                    raise ValueError("a comma is missing")
                commas = len(values)
                continue
            values.append(self._value())
            if opened == "{" and self.tokens[self.at] == ("mark", ":"):
                self.at += 1
                keys.append(values.pop())
                values.append(self._value())
        self.at += 1
        if keys:
            return dict(zip(keys, values, strict=True))
        if opened == "(" and len(values) == 1 and self.tokens[self.at - 2] != ("mark", ","):
            raise ValueError("a value in brackets is no tuple")
        return values


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = TOKEN.match(text, at)
        if found is None:
            yield ("unknown", text[at])
            return
        yield str(found.lastgroup), found[0].strip()
        at = found.end()


def _number(text: str) -> Any:
    if not NUMBER.fullmatch(text):
        raise ValueError(f"no number: {text!r}")
    value = int(text) if text.lstrip("+-").isdigit() else float(text)
    return value if repr(value) in (text, text + "0") else text
