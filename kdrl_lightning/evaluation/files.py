"""Writes predictions to a JSON Lines or Parquet file, batch by batch."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError

# Columns of a Parquet file; all other columns of a row are JSON in ``row``.
COLUMNS = {
    "set": "string",
    "index": "int64",
    "sample": "int64",
    "prompt": "string",
    "completion": "string",
    "answer_found": "string",
    "reward": "float64",
    "correct": "bool",
    "truncated": "bool",
    "length": "int64",
}


class PredictionFile(ABC):
    """A file of predictions that gets its final name only when it is closed, i.e. complete.

    Args:
        path: the final name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.half = path.with_name(path.name + ".part")
        self.rows = 0

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Append rows."""

    def close(self) -> None:
        """Rename the file to its final name."""
        os.replace(self.half, self.path)


class JSONLFile(PredictionFile):
    """A prediction file with one JSON object per line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = open(self.half, "w", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def write(self, rows: Sequence[Row]) -> None:
        """Append one line per row."""
        self._file.writelines(_json(row) + "\n" for row in rows)
        self.rows += len(rows)

    def close(self) -> None:
        """Close the file and give it its final name."""
        self._file.close()
        super().close()


class ParquetFile(PredictionFile):
    """A Parquet file with the columns of ``COLUMNS``, the reward's ``parts``, and ``row`` as JSON.

    The source's columns are JSON because their types may change from row to row, but a Parquet file
    has one schema.

    Raises:
        ConfigurationError: pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ConfigurationError(
                "`format` must be jsonl if pyarrow is not installed: got parquet. "
                "Install it: pip install 'kdrl_lightning[tasks]'."
            ) from error
        fields = [(name, pyarrow.type_for_alias(kind)) for name, kind in COLUMNS.items()]
        parts = pyarrow.map_(pyarrow.string(), pyarrow.float64())
        self._schema = pyarrow.schema([*fields, ("parts", parts), ("row", pyarrow.string())])
        self._table = pyarrow.Table
        self._writer = parquet.ParquetWriter(self.half, self._schema)

    def write(self, rows: Sequence[Row]) -> None:
        """Append the rows as one row group."""
        if rows:
            made = [_columns(row) for row in rows]
            self._writer.write_table(self._table.from_pylist(made, schema=self._schema))
        self.rows += len(rows)

    def close(self) -> None:
        """Write the footer and give the file its final name."""
        self._writer.close()
        super().close()


def _columns(row: Row) -> dict[str, object]:
    ours = {name: row.get(name) for name in COLUMNS}
    prompt = ours["prompt"]
    ours["prompt"] = prompt if isinstance(prompt, str) else _json(prompt)
    rest = {k: v for k, v in row.items() if k not in COLUMNS and k not in ("parts", "row")}
    rest |= row.get("row", {})
    texts = {k: _utf8(v) if isinstance(v, str) else v for k, v in ours.items()}
    return {**texts, "parts": list(row["parts"].items()), "row": _json(rest)}


def _json(value: object) -> str:
    """Convert any value of a data set to JSON: arrays to lists, NaN to null, others to text."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None if math.isnan(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _utf8(text: str) -> str:
    """Replace characters that UTF-8 cannot encode (lone surrogates)."""
    return text.encode("utf-8", "replace").decode("utf-8")
