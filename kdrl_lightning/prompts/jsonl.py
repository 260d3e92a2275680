"""Prompts from a JSON Lines file."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from kdrl_lightning.common.untyped import Row, Tree
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.base import PromptSource
from kdrl_lightning.prompts.messages import PromptForm

# `Any`: arguments of users' chat templates, and a sequence's index.


class JSONLPrompts(PromptSource):
    """Rows of a file with one JSON object per line; each row keeps all its columns.

    It needs no other library, and keeps only the positions of lines in memory.

    Args:
        path: the file.
        prompt_column: column with the question.
        chat: make chat messages, for the tokenizer's chat template.
        system: system message (needs ``chat``).
        template_args: arguments of the chat template (needs ``chat``).
        examples: solved questions before the question, each with ``prompt`` and ``answer``.
        suffix: text to add to every question.
        prefill: the beginning of every answer, which the model continues (needs ``chat``).
    """

    def __init__(
        self,
        path: str,
        prompt_column: str = "prompt",
        chat: bool = False,
        system: str | None = None,
        template_args: Tree | None = None,
        examples: Sequence[dict[str, str]] = (),
        suffix: str = "",
        prefill: str | None = None,
    ) -> None:
        self.form = PromptForm(chat, system, template_args, examples, suffix, prefill)
        self.prompt_column = prompt_column
        self.rows = JSONLines(Path(path), prompt_column)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.rows[index]
        return self.form.row(row, row[self.prompt_column])


class JSONLines(Sequence[Row]):
    """The rows of a JSON Lines file, checked line by line; only their positions are in memory.

    Args:
        path: the file.
        column: a column that every row must have; None: rows may have any columns.

    Raises:
        ConfigurationError: the file or a line cannot be read, or the file has no rows.
    """

    def __init__(self, path: Path, column: str | None) -> None:
        if not path.is_file():
            raise ConfigurationError(
                f"`path` must be a JSON Lines file: got {path}, which is not a file. Check the "
                "path and the working folder."
            )
        self.path = path
        self._starts = array("q")
        start = 0
        try:
            with path.open("rb") as file:
                self._state = _state(file)
                for number, line in enumerate(file, 1):
                    text = _text(line, start)
                    if text.strip():
                        _check(text, f"{path}:{number}", column)
                        self._starts.append(start)
                    start += len(line)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"`path` must be readable UTF-8: got {path} ({error}). Convert the file."
            ) from error
        if not self._starts:
            raise ConfigurationError(
                f"`path` must have at least one row: got {path}, which is empty. Name another file."
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        """Read one row, or a list of rows for a slice.

        Raises:
            ConfigurationError: the file has changed since it was checked.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._starts[index]
        with self.path.open("rb") as file:
            if _state(file) != self._state:
                raise ConfigurationError(
                    f"`path` must not change during a run: got {self.path}, which has changed. "
                    "Start the run again."
                )
            file.seek(start)
            return json.loads(_text(file.readline(), start))


def _state(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _text(line: bytes, start: int) -> str:
    return line.decode("utf-8-sig" if start == 0 else "utf-8")  # Windows editors write a BOM


def _check(text: str, where: str, column: str | None) -> None:
    try:
        row = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{where} must be JSON: got {error}. Fix the line.") from error
    except KeyError as error:
        raise ConfigurationError(
            f"{where} must have each key once: got {error} twice. Remove one."
        ) from error
    if not isinstance(row, dict) or (column is not None and column not in row):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigurationError(
            f"{where} must have the column `{column}`: got {found}. "
            "Name yours with `prompt_column`."
        )


# `Any`: what JSON can hold.
def _once(pairs: list[tuple[str, Any]]) -> Tree:
    """Build a JSON object with unique keys; `json` would keep the last of two equal keys.

    Raises:
        KeyError: a key occurs twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return made
