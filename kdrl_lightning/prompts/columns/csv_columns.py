"""Finds the columns of a CSV file that must stay text, and refuses a file whose rows would shift.

pandas reads `1.50` as 1.5 and `007` as 7, which would change reference answers. If rows have more
cells than the header, it takes the first column as an index.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from kdrl_lightning.errors import ConfigurationError

NUMBER = re.compile(
    r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?inf(?:inity)?", re.I
)
# Whole numbers as Python writes them; a float64 is exact up to 15 digits.
WHOLE = re.compile(r"-?[1-9][0-9]{0,14}|0")
# What pandas takes for a missing value, besides an empty cell.
MISSING = {"None", "null", "NULL", "nan", "NaN", "-nan", "-NaN", "NA", "N/A", "n/a", "<NA>"}
MISSING |= {"#N/A", "#NA", "#N/A N/A", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}


def text_columns(path: Path) -> list[str]:
    """Return the columns of a CSV file with a text that the reader would change.

    These are numbers in a form that a number would lose (007, 1.50, +5, 12345678901234567890), and
    words that the reader takes for missing (None, NA); a warning names the latter.

    Raises:
        ConfigurationError: two columns have one name, or a row has more cells than the header.
    """
    found: set[int] = set()
    words: dict[int, str] = {}
    names: list[str] = []
    try:
        for number, cells in _lines(path):
            if not names:
                names = _checked(cells, path)
                continue
            if len(cells) > len(names):
                raise ConfigurationError(
                    f"{path}:{number} must have at most {len(names)} cells, as the first line has: "
                    f"got {len(cells)}. Put quotes around a text that contains a comma."
                )
            found.update(i for i, cell in enumerate(cells) if i not in found and _is_lossy(cell))
            for i, cell in enumerate(cells):
                if cell in MISSING:
                    words.setdefault(i, cell)
    except (csv.Error, UnicodeDecodeError):  # the dataset's reader raises a better error later
        return []
    for i, word in words.items():
        warnings.warn(
            f"the column `{names[i]}` of {path} has the text {word!r}, which is read as text. If "
            "the value is missing, leave the cell empty.",
            stacklevel=2,
        )
    return [name for i, name in enumerate(names) if i in found | words.keys()]


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of a row's last line and the row's cells; pandas skips empty lines, too."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        for cells in rows:
            if cells:
                yield rows.line_num, cells


def _checked(names: Sequence[str], path: Path) -> list[str]:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ConfigurationError(
            f"{path} must have one column of each name: got {twice[0]!r} twice. Rename one."
        )
    return list(names)


def _is_lossy(cell: str) -> bool:
    """Return whether a cell holds a number that would be written differently after it was read.

    >>> [_is_lossy(c) for c in ("007", "1.50", "+5", "1e5", "72", "7.5", "-0.1", "2.0", "x", "")]
    [True, True, True, True, False, False, False, False, False, False]
    """
    cell = cell.strip()
    if not NUMBER.fullmatch(cell) or WHOLE.fullmatch(cell):
        return False
    return repr(float(cell)) != cell
