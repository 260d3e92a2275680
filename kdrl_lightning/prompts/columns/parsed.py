"""Rows whose columns hold lists or dicts as text, as CSV files keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.common.written_values import read_container
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.base import Prompts, PromptSource

# `Any`: what a column may hold.


class ParsedPrompts(PromptSource):
    """The rows of another source, with the texts of lists and dicts read as lists and dicts.

    CSV files store a list of accepted answers as text: ``['72', '73']``. Texts are read if JSON,
    Python, numpy, torch or pandas wrote them (see ``read_container``). A text that is no list or
    dict stays as it is.

    Args:
        source: the rows.
        columns: columns to read, e.g. ``[answer]``. To take an entry of a dict as the column's
            value, name it after a dot: ``answer.ground_truth``.

    Raises:
        ConfigurationError: no columns, or the first row does not have one of them.

    >>> rows = [{"prompt": "6*12=", "answer": "['72', '72.0']"}, {"prompt": "?", "answer": "72"}]
    >>> [row["answer"] for row in ParsedPrompts(rows, columns=["answer"])]
    [['72', '72.0'], '72']
    """

    def __init__(self, source: Prompts, columns: Sequence[str]) -> None:
        if isinstance(columns, str) or not columns or "prompt" in columns:
            raise ConfigurationError(
                f"`columns` must be a list of columns other than `prompt`: got {columns!r}. Name "
                "the column with the answers, e.g. [answer]."
            )
        self.source = source
        self.columns = list(columns)
        if len(source):
            _ = self[0]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row:
        row = self.source[index]
        if not isinstance(row, Mapping):
            return row  # the encoding refuses it
        parsed: dict[str, Any] = {}
        for column in self.columns:
            name, *path = [column] if column in row else column.split(".")
            if name not in row:
                raise ConfigurationError(
                    f"`columns` must be columns of the rows: got {column}. The row has "
                    f"{', '.join(map(str, row))}."
                )
            parsed[name] = _inside(_read(row[name]), path, column)
        return {**row, **parsed}

    def where(self, index: int) -> str:
        """Describe where a row comes from, as its source does."""
        return self.source.where(index) if isinstance(self.source, PromptSource) else ""


def _read(value: Any) -> Any:
    found = read_container(value) if isinstance(value, str) else None
    return value if found is None else found


def _inside(value: Any, path: Sequence[str], column: str) -> Any:
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            raise ConfigurationError(
                f"`columns` must name entries that a row has: got {column} for {value!r:.60}. "
                "Correct the name, or remove the row."
            )
        value = _read(value[key])
    return value
