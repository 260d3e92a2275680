"""Prompts from a Hugging Face dataset, by its name on the hub or from local files."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrl_lightning.common.untyped import Row, Tree
from kdrl_lightning.errors import ConfigurationError, load_library, require_count
from kdrl_lightning.prompts.base import PromptSource
from kdrl_lightning.prompts.columns.column_types import (
    has_long_numbers,
    has_names,
    has_times,
    with_names,
)
from kdrl_lightning.prompts.columns.csv_columns import text_columns
from kdrl_lightning.prompts.jsonl import JSONLines
from kdrl_lightning.prompts.messages import PromptForm

# `Any`: a column's content, arguments of users' chat templates, and classes of the library
# datasets.

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}


class HFPrompts(PromptSource):
    """Rows of a dataset; each row keeps all its columns and gets ``prompt`` (and ``answer``).

    Name a nested column with a dot: ``reward_model.ground_truth``. A ``ClassLabel`` column has the
    names of the classes. Texts of a file stay as they are: a column of a CSV file with a number
    like 007 or 1.50 is text, and so is a date in JSON.

    Args:
        path: name on the hub, a file (JSONL, JSON, Parquet, CSV, Arrow), or a folder that
            ``save_to_disk`` wrote.
        name: the dataset's configuration on the hub.
        split: the dataset's split. A file has only ``train``.
        prompt_column: column with the question, a text or chat messages.
        answer_column: column that becomes ``answer``; None changes no column.
        take: number of rows to keep, from the first; None: all.
        chat: make chat messages, for the tokenizer's chat template.
        system: system message (needs ``chat``).
        template_args: arguments of the chat template (needs ``chat``).
        examples: solved questions before the question, each with ``prompt`` and ``answer``.
        suffix: text to add to every question.
        prefill: the beginning of every answer, which the model continues (needs ``chat``).
    """

    _streaming = False

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        prompt_column: str = "prompt",
        answer_column: str | None = None,
        take: int | None = None,
        chat: bool = False,
        system: str | None = None,
        template_args: Tree | None = None,
        examples: Sequence[dict[str, str]] = (),
        suffix: str = "",
        prefill: str | None = None,
    ) -> None:
        if take is not None:
            require_count("take", take, 1, float("inf"))
        self.form = PromptForm(chat, system, template_args, examples, suffix, prefill)
        self.prompt_column = prompt_column
        self.answer_column = answer_column
        self.rows, features = _load(path, name, split, take, self._streaming)
        self._classes = {n: one for n, one in (features or {}).items() if has_names(one)}
        if not len(self.rows):
            raise ConfigurationError(
                f"`path` must have at least one row: got {path}, without rows. Name another file "
                "or split."
            )
        try:
            first = self.rows[0]
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"`path` must be UTF-8: got {path} ({error}). Convert the file."
            ) from error
        for argument, column in (
            ("prompt_column", prompt_column),
            ("answer_column", answer_column),
        ):
            if column is not None:
                _look_up(first, column, argument)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.rows[index]
        if self._classes:
            named = {name: with_names(one, row[name]) for name, one in self._classes.items()}
            row = {**row, **named}
        if self.answer_column is not None:
            row = {**row, "answer": _look_up(row, self.answer_column, "answer_column")}
        return self.form.row(row, _look_up(row, self.prompt_column, "prompt_column"))


class StreamedHFPrompts(HFPrompts):
    """The first rows of a dataset; every run downloads only these rows.

    Rows and other arguments are as for ``HFPrompts``. The rows are kept in memory.

    Args:
        path: name on the hub, a file (JSONL, JSON, Parquet, CSV, Arrow), or a folder that
            ``save_to_disk`` wrote.
        take: number of rows to keep, from the first.
        name: the dataset's configuration on the hub.
        split: the dataset's split. A file has only ``train``.
        prompt_column: column with the question, a text or chat messages.
        answer_column: column that becomes ``answer``; None changes no column.
        chat: make chat messages, for the tokenizer's chat template.
        system: system message (needs ``chat``).
        template_args: arguments of the chat template (needs ``chat``).
        examples: solved questions before the question, each with ``prompt`` and ``answer``.
        suffix: text to add to every question.
        prefill: the beginning of every answer, which the model continues (needs ``chat``).
    """

    _streaming = True

    def __init__(
        self,
        path: str,
        take: int,
        name: str | None = None,
        split: str = "train",
        prompt_column: str = "prompt",
        answer_column: str | None = None,
        chat: bool = False,
        system: str | None = None,
        template_args: Tree | None = None,
        examples: Sequence[dict[str, str]] = (),
        suffix: str = "",
        prefill: str | None = None,
    ) -> None:
        form = (chat, system, template_args, examples, suffix, prefill)
        super().__init__(path, name, split, prompt_column, answer_column, take, *form)


def _look_up(row: Row, column: str, argument: str) -> Any:
    value: Any = row
    for key in [column] if column in row else column.split("."):
        if value is None:
            raise ConfigurationError(
                f"a row must have a value in `{column}`: got None on the way to it. Remove the row."
            )
        if not isinstance(value, Mapping) or key not in value:
            raise ConfigurationError(
                f"`{argument}` must be a column of the dataset: got {column}. "
                f"The dataset has {', '.join(map(_shown, row))}."
            )
        value = value[key]
    return value


def _shown(name: object) -> str:
    text = str(name)
    return text if text == text.strip() else repr(text)


def _load(
    path: str, name: str | None, split: str, take: int | None, streaming: bool
) -> tuple[Any, Any]:
    """Return the rows, and the types of their columns if they are known."""
    datasets = load_library("datasets")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    local = Path(path)
    kind = local.suffix.lower()
    if not local.exists() and kind in READERS:
        raise ConfigurationError(
            f"`path` must be a file that exists: got {path}. Check the path and the working folder."
        )
    try:
        if local.is_dir() and any(
            (local / f"{s}.json").is_file() for s in ("state", "dataset_dict")
        ):
            rows = datasets.load_from_disk(path)
            rows = rows[split] if isinstance(rows, Mapping) else rows
        elif local.is_file():
            if kind not in READERS:
                raise ValueError(f"a file must end in one of {', '.join(READERS)}")
            rows = _read(datasets, local, split, streaming)
        else:
            rows = datasets.load_dataset(path, name, split=split, streaming=streaming)
        features = getattr(rows, "features", None)
        if streaming and not isinstance(rows, Sequence | datasets.Dataset):
            return list(itertools.islice(rows, take)), features
        return _first(rows, take), features
    except ConfigurationError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # datasets wraps the reader's error in a generic one
        first = (str(cause).splitlines() or ["no rows"])[0]
        raise ConfigurationError(
            f"`path` must be a dataset that can be read: got {path}, split {split} "
            f"({type(cause).__name__}: {first[:300]}). Check the name, the split and the file."
        ) from error


def _read(datasets: Any, file: Path, split: str, streaming: bool) -> Any:
    reader = READERS[file.suffix.lower()]
    given: Tree = {"data_files": str(file), "split": split}
    if reader == "csv":
        texts = text_columns(file)
        given |= {"converters": dict.fromkeys(texts, str)} if texts else {}
        given |= {"keep_default_na": False, "na_values": [""]}
    if reader != "json":
        return datasets.load_dataset(reader, streaming=streaming, **given)
    # The library turns long whole numbers into floats, and texts that look like dates into times.
    changed = "long numbers"
    if not has_long_numbers(file):
        rows = datasets.load_dataset(reader, **given)  # nothing to download
        changed = "dates"
        if not has_times(rows.features):
            return rows
    if split != "train":
        raise ConfigurationError(
            f"`split` must be train for a JSON file with {changed}: got {split} of {file}. Use "
            "`take`, or convert the file to Parquet."
        )
    with file.open(encoding="utf-8-sig") as text:
        array = text.read(1024).lstrip().startswith("[")
    return json.loads(file.read_text(encoding="utf-8-sig")) if array else JSONLines(file, None)


def _first(rows: Any, take: int | None) -> Any:
    if take is None or take >= len(rows):
        return rows
    return rows.select(range(take)) if hasattr(rows, "select") else rows[:take]
