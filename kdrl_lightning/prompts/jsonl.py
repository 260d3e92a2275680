"""Prompts from a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.base import PromptSource
from kdrl_lightning.prompts.messages import PromptForm


class JSONLPrompts(PromptSource):
    """One JSON object per line, read without another library; all columns stay in the row.

    Args:
        path: the file.
        prompt_column: column with the question.
        chat: as messages, for the tokenizer's chat template.
        system: system message (needs ``chat``).
        template_args: arguments of the chat template (needs ``chat``).
        examples: solved questions before it, each with ``prompt`` and ``answer``.
        suffix: put behind every question.
        prefill: the beginning of every answer, which the model continues (needs ``chat``).
    """

    def __init__(
        self,
        path: str,
        prompt_column: str = "prompt",
        chat: bool = False,
        system: str | None = None,
        template_args: dict[str, Any] | None = None,
        examples: Sequence[dict[str, str]] = (),
        suffix: str = "",
        prefill: str | None = None,
    ) -> None:
        self.form = PromptForm(chat, system, template_args, examples, suffix, prefill)
        self.prompt_column = prompt_column
        self.rows = _read(Path(path), prompt_column)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return self.form.row(row, row[self.prompt_column])


def _read(path: Path, column: str) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ConfigurationError(f"`path` must be a JSON Lines file: got {path}, which is no file.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"`path` must be readable UTF-8: got {path} ({error}).") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{path}:{number} must be JSON: got {error}.") from error
        if not isinstance(row, dict) or column not in row:
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ConfigurationError(
                f"{path}:{number} must have the column `{column}`: got {found}. "
                "Name yours with `prompt_column`."
            )
        rows.append(row)
    if not rows:
        raise ConfigurationError(f"`path` must have at least one row: got {path}, which is empty.")
    return rows
