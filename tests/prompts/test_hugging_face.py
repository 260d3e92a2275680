"""Rows of Hugging Face datasets, from every kind of local file."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts import HFPrompts, StreamedHFPrompts

ROWS = [{"q": f"{i}+1=", "a": {"gold": str(i + 1)}, "n": i} for i in range(5)]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = datasets.Dataset.from_list(ROWS)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.remove_columns("a").to_csv(tmp_path / "rows.csv")
    rows.save_to_disk(tmp_path / "saved")
    os.link(tmp_path / "saved/data-00000-of-00001.arrow", tmp_path / "rows.arrow")
    datasets.DatasetDict(train=rows, test=rows.select([4])).save_to_disk(tmp_path / "splits")
    return tmp_path


def expected(i: int) -> dict[str, Any]:
    return {**ROWS[i], "prompt": f"{i}+1=", "answer": str(i + 1)}


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.parquet", "rows.arrow", "saved", "splits"])
def test_every_kind_of_file_gives_the_same_rows(folder: Path, file: str) -> None:
    rows = HFPrompts(str(folder / file), prompt_column="q", answer_column="a.gold")
    assert [rows[i] for i in range(len(rows))] == [expected(i) for i in range(5)]


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.parquet", "rows.arrow", "saved"])
@pytest.mark.parametrize("kind", [HFPrompts, StreamedHFPrompts])
def test_so_many_rows_are_taken(folder: Path, file: str, kind: type[HFPrompts]) -> None:
    path = str(folder / file)
    rows = kind(path, prompt_column="q", answer_column="a.gold", take=2)
    assert [rows[i] for i in range(len(rows))] == [expected(i) for i in range(2)]
    assert len(kind(path, prompt_column="q", take=9)) == 5


def test_only_the_taken_rows_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def stream(*args: Any, streaming: bool, **kwargs: Any) -> Iterator[dict[str, Any]]:
        assert streaming
        for i, row in enumerate(ROWS):
            read.append(i)
            yield row

    monkeypatch.setattr(datasets, "load_dataset", stream)
    rows = StreamedHFPrompts("some/name", prompt_column="q", take=3)
    assert [row["q"] for row in rows] == ["0+1=", "1+1=", "2+1="] and read == [0, 1, 2]


def test_a_stream_has_a_size_and_the_same_form() -> None:
    stream, whole = (inspect.signature(c).parameters for c in (StreamedHFPrompts, HFPrompts))
    assert stream.keys() == whole.keys()
    assert stream["take"].default is inspect.Parameter.empty
    assert all(stream[name].default == whole[name].default for name in set(whole) - {"take"})


def test_csv(folder: Path) -> None:
    rows = HFPrompts(str(folder / "rows.csv"), prompt_column="q", answer_column="n")
    assert rows[3] == {"q": "3+1=", "n": 3, "prompt": "3+1=", "answer": 3}


def test_a_split_of_a_saved_folder(folder: Path) -> None:
    rows = HFPrompts(str(folder / "splits"), split="test", prompt_column="q")
    assert [row["prompt"] for row in (rows[0],)] == ["4+1="] and len(rows) == 1


def test_the_form_of_the_prompt(folder: Path) -> None:
    rows = HFPrompts(
        str(folder / "rows.jsonl"),
        prompt_column="q",
        chat=True,
        system="Add.",
        template_args={"enable_thinking": False},
        suffix=" Be brief.",
    )
    assert rows[0]["template_args"] == {"enable_thinking": False}
    assert rows[0]["prompt"] == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "0+1= Be brief."},
    ]


BAD = {
    "no such file": ({"path": "none.csv"}, "`path` must be a file that exists: got {0}/none.csv."),
    "no rows": ({"path": "empty.jsonl"}, "(StopIteration: no rows)"),
    "no JSON": ({"path": "bad.jsonl"}, "`path` must be a dataset that can be read: got {0}/bad."),
    "no Parquet": ({"path": "bad.parquet"}, "(ArrowInvalid: Parquet"),
    "another kind": ({"path": "rows.txt"}, "a file must end in one of .jsonl, .json, .parquet"),
    "no such split": ({"path": "rows.jsonl", "split": "test"}, 'Unknown split "test"'),
    "no such saved split": ({"path": "splits", "split": "val"}, "KeyError: 'val'"),
    "no such prompt": (
        {"path": "rows.jsonl"},
        "`prompt_column` must be a column of the dataset: got prompt. The dataset has q, a, n.",
    ),
    "no such answer": (
        {"path": "rows.jsonl", "prompt_column": "q", "answer_column": "a.no"},
        "`answer_column` must be a column of the dataset: got a.no. The dataset has q, a, n.",
    ),
    "nothing taken": ({"path": "rows.jsonl", "take": 0}, "`take` must be at least 1: got 0."),
    "a template without a chat": (
        {"path": "rows.jsonl", "template_args": {"a": 1}},
        "`template_args` must go with `chat: true`: got {{'a': 1}}. Set `chat: true`.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_line(folder: Path, case: str) -> None:
    for name in ("empty.jsonl", "rows.txt"):
        (folder / name).write_text("")
    (folder / "bad.jsonl").write_text("{nope")
    (folder / "bad.parquet").write_text("xx")
    arguments, words = BAD[case]
    path = str(folder / str(arguments["path"]))
    with pytest.raises(ConfigurationError, match=re.escape(words.format(folder))) as caught:
        HFPrompts(**{**arguments, "path": path})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_dataset_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("prompt,answer\n")
    with pytest.raises(ConfigurationError, match=r"`path` must have at least one row: got .*none"):
        StreamedHFPrompts(str(tmp_path / "none.csv"), take=3)


def test_a_name_that_the_hub_does_not_have_is_one_line() -> None:
    with pytest.raises(ConfigurationError, match=r"^`path` must be a dataset .*: got no/such, spl"):
        HFPrompts("no/such")


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "\u00e9", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"^`path` must be UTF-8: got .*rows\.jsonl \("):
        HFPrompts(str(path))
