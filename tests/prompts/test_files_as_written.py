"""A run trains on what a file says: numbers, dates, classes and cells are not changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts import HFPrompts, JSONLPrompts, StreamedHFPrompts
from kdrl_lightning.prompts.columns.column_types import BLOCK, has_long_numbers
from kdrl_lightning.rewards import ExactMatch
from kdrl_lightning.rewards.base import Sample

pytestmark = pytest.mark.usefixtures("own_cache")


def rows(source: HFPrompts) -> list[dict[str, Any]]:
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize(
    "cells",
    [
        ["1.50", "2"],
        ["2", "0.50", "1e5"],
        ["+5", "5"],
        [".5", "-0"],
        ["12345678901234567890", "2"],
        ["9007199254740993", "", "1"],  # above the whole numbers that a float holds
        ["123456789012345678901234567890", "2"],
        ["3.1400", "1e-7"],
    ],
)
def test_a_number_of_a_csv_counts_as_it_is_written(tmp_path: Path, cells: list[str]) -> None:
    text = "".join(f'"q, {i}",{cell}\n' for i, cell in enumerate(cells))
    (tmp_path / "x.csv").write_text("prompt,answer\n" + text)
    for row, cell in zip(rows(HFPrompts(str(tmp_path / "x.csv"))), cells, strict=True):
        if cell:
            assert ExactMatch()(Sample(cell, [], row)) == 1.0
        else:
            with pytest.raises(ConfigurationError, match="a row must have an answer"):
                ExactMatch().check(row)


@pytest.mark.parametrize("word", ["None", "nan", "NA", "null", "N/A"])
def test_a_word_of_a_csv_is_no_empty_cell(tmp_path: Path, word: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"prompt,answer,n\nq,{word},1\nr,5,2\ns,,3\n")
    words = rf"^the column `answer` of .*x\.csv has the text '{word}', which is read as text"
    with pytest.warns(UserWarning, match=words):
        found = rows(HFPrompts(str(path)))
    assert [row["answer"] for row in found[:2]] == [word, "5"]
    assert [row["n"] for row in found] == [1, 2, 3]
    assert ExactMatch()(Sample(word, [], found[0])) == 1.0
    with pytest.raises(ConfigurationError, match="a row must have an answer"):
        ExactMatch().check(found[2])


@pytest.mark.parametrize("form", ["x.jsonl", "x.json"])
@pytest.mark.parametrize("number", [10**20 + 1, -(2**53) - 1])
def test_a_long_number_of_a_json_file_keeps_its_digits(
    tmp_path: Path, form: str, number: int
) -> None:
    made = [{"prompt": "q", "answer": number}, {"prompt": "r", "answer": 0.5}]
    lines = "\n".join(map(json.dumps, made))
    (tmp_path / form).write_text(lines if form == "x.jsonl" else json.dumps(made))
    found = rows(HFPrompts(str(tmp_path / form)))
    assert [row["answer"] for row in found] == [number, 0.5]
    with pytest.raises(ConfigurationError, match="must be train for a JSON file with long numbers"):
        HFPrompts(str(tmp_path / form), split="train[:1]")


def test_a_long_number_is_found_where_two_blocks_meet(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for place in range(BLOCK - 18, BLOCK + 2):
        file.write_bytes(b" " * place + b"-1234567890123456" + b" " * 9)
        assert has_long_numbers(file)
    file.write_bytes(b'0.1234567890123456 123456789012345 "1234567890123456"')
    assert not has_long_numbers(file)


def test_ordinary_numbers_of_a_csv_stay_numbers(tmp_path: Path) -> None:
    (tmp_path / "X.CSV").write_text("prompt,answer,n\nq,72,0.5\nr,-3,2.0\n\n")
    found = rows(HFPrompts(str(tmp_path / "X.CSV")))
    assert [(row["answer"], row["n"]) for row in found] == [(72, 0.5), (-3, 2.0)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # pandas would take the first cells as an index, and " b?" as the prompt.
        (
            "prompt,answer\nWhat is a, b?,5\nIs it c, d?,6\n",
            r"x\.csv:2 must have at most 2 cells, as the first line has: got 3\. Put quotes",
        ),
        ('prompt,answer\n"q\nr",5\ns,6,\n', r"x\.csv:4 must have at most 2 cells"),
        ("prompt,answer,answer\nq,5,6\n", "one column of each name: got 'answer' twice"),
    ],
)
def test_a_csv_whose_cells_would_shift_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        HFPrompts(str(tmp_path / "x.csv"))


def test_a_column_with_spaces_around_its_name_is_shown_with_them(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt, answer\nq, 5\n")
    with pytest.raises(ConfigurationError, match=r"got answer\. The dataset has prompt, ' answer'"):
        HFPrompts(str(tmp_path / "x.csv"), answer_column="answer")


@pytest.mark.parametrize("day", ["2026-01-01", "2026-01-01T10:00:00Z", "2026-01-01 10:00:00"])
@pytest.mark.parametrize("form", ["x.jsonl", "x.json"])
def test_a_text_that_looks_like_a_date_stays_as_it_is(tmp_path: Path, form: str, day: str) -> None:
    made = [{"prompt": day, "answer": {"when": [day]}}, {"prompt": "q", "answer": {"when": []}}]
    lines = "\n".join(map(json.dumps, made))
    (tmp_path / form).write_text(lines if form == "x.jsonl" else json.dumps(made))
    found = rows(HFPrompts(str(tmp_path / form), answer_column="answer.when"))
    assert found[0]["prompt"] == day and found[0]["answer"] == [day] and len(found) == 2
    assert len(StreamedHFPrompts(str(tmp_path / form), take=1)) == 1
    with pytest.raises(ConfigurationError, match="`split` must be train for a JSON file with dat"):
        HFPrompts(str(tmp_path / form), split="train[:1]")


def test_a_class_counts_by_its_name(tmp_path: Path) -> None:
    kind = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "label": kind,
            "inner": {"all": datasets.List(kind)},
        }
    )
    cells = {"prompt": ["q", "r"], "label": [1, -1], "inner": [{"all": [0, 1]}, None]}
    made = datasets.Dataset.from_dict(cells, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "x.parquet")
    for path in ("saved", "x.parquet"):
        first, second = rows(HFPrompts(str(tmp_path / path), answer_column="label"))
        assert first["answer"] == first["label"] == "positive" and second["answer"] is None
        assert first["inner"] == {"all": ["negative", "positive"]}
        nested = HFPrompts(str(tmp_path / path), answer_column="inner.all")
        assert nested[0]["answer"] == ["negative", "positive"]
        with pytest.raises(
            ConfigurationError, match=r"a row must have a value in `inner\.all`: got"
        ):
            nested[1]


def test_a_key_twice_in_a_line_of_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "q"}\n{"prompt": "q", "a": {"b": 1, "b": 2}}\n')
    with pytest.raises(ConfigurationError, match=r"x\.jsonl:2 must have each key once: got 'b' tw"):
        JSONLPrompts(str(tmp_path / "x.jsonl"))
