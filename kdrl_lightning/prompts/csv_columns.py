"""Finds the columns of a CSV file that must stay text, and refuses a file whose rows would shift.

pandas reads `1.50` as 1.5 and `007` as 7, so the answer of the file would be wrong; it takes the
first column as an index if rows have more cells than the header.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from kdrl_lightning.errors import ConfigurationError

NUMBER = re.compile(
    r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?inf(?:inity)?", re.I
)
# As Python writes whole numbers; a float64 holds all of 15 digits.
WHOLE = re.compile(r"-?[1-9][0-9]{0,14}|0")


def text_columns(path: Path) -> list[str]:
    """Return the columns of a CSV file that hold a number in a form that a number would lose.

    These are e.g. 007, 1.50, +5 and 12345678901234567890.

    Raises:
        ConfigurationError: two columns have one name, or a row has more cells than the header.
    """
    found: set[int] = set()
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
    except (csv.Error, UnicodeDecodeError):  # the dataset's reader raises a better error later
        return []
    return [name for i, name in enumerate(names) if i in found]


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
