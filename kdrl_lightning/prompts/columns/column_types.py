"""Finds columns whose values `datasets` changes: dates, long numbers and class names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# `Any` in this file: features of `datasets`, and values of a row.

DIGITS, BLOCK = 16, 1 << 20
LONG = re.compile(rb"[:,\[\s]-?[0-9]{%d}" % DIGITS)  # not inside a text like "id-123"


def has_times(features: Any) -> bool:
    """Return whether a column holds dates or times, at any depth."""
    if isinstance(features, Mapping):
        return any(has_times(one) for one in features.values())
    inside = getattr(features, "feature", None)
    kind = str(getattr(features, "dtype", ""))
    return has_times(inside) if inside is not None else kind.startswith(("timestamp", "date"))


def has_long_numbers(file: Path) -> bool:
    """Return whether a JSON file may hold a whole number that a float64 would round."""
    with file.open("rb") as opened:
        before = b""
        while part := opened.read(BLOCK):
            if LONG.search(before + part):
                return True
            before = part[-DIGITS - 1 :]
    return False


def has_names(feature: Any) -> bool:
    """Return whether a column holds class ids (``ClassLabel``), at any depth."""
    if isinstance(feature, Mapping):
        return any(has_names(one) for one in feature.values())
    return hasattr(feature, "int2str") or has_names(getattr(feature, "feature", {}))


def with_names(feature: Any, value: Any) -> Any:
    """Return a value with class names in place of class ids; -1 (no class) becomes None."""
    if value is None:
        return None
    if hasattr(feature, "int2str"):
        return feature.int2str(value) if value >= 0 else None
    if isinstance(feature, Mapping):
        return {name: with_names(feature[name], one) for name, one in value.items()}
    if hasattr(feature, "feature"):
        return [with_names(feature.feature, one) for one in value]
    return value
