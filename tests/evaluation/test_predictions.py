"""Files of predictions: complete, in order, and readable whatever a model writes."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO, EvalSet
from kdrl_lightning.__main__ import main
from kdrl_lightning.callbacks import PredictionWriter
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.evaluation.files import JSONLFile, ParquetFile
from kdrl_lightning.tiny import ColumnAddition

SETS = {
    "a": EvalSet(ColumnAddition(5, seed=2), samples=2, temperature=1.0, batch_size=2),
    "b": EvalSet([{"prompt": "1+2=", "level": 3, "answer": "3"}]),
}


def predict(tmp_path: Path, student: str, writer: PredictionWriter) -> list[Any]:
    trainer = make_trainer(tmp_path, callbacks=[writer])
    module, data = make_module(student, None, GRPO()), make_data(val_prompts=SETS)
    return [row for s in trainer.predict(module, datamodule=data) or [] for b in s for row in b]


def test_both_formats_hold_the_rows_in_order(tmp_path: Path, student_folder: str) -> None:
    from pyarrow import parquet

    rows = predict(tmp_path, student_folder, PredictionWriter())
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows and len(rows) == 11
    predict(tmp_path, student_folder, PredictionWriter("parquet"))
    table = parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    for name in ("set", "index", "sample", "prompt", "completion", "reward", "correct", "length"):
        assert [row[name] for row in table] == [row[name] for row in rows], name
    assert json.loads(table[-1]["row"]) == {"level": 3, "answer": "3"}
    assert not list(tmp_path.glob("*.part"))


def test_a_file_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    file = JSONLFile(tmp_path / "x.jsonl")
    file.write([{"a": 1}])
    assert not file.path.exists() and file.half.exists()
    file.close()
    assert file.path.read_text() == '{"a": 1}\n' and not file.half.exists()


def test_parquet_takes_any_prompt_and_any_text(tmp_path: Path) -> None:
    from pyarrow import parquet

    base = {"index": 0, "sample": 0, "reward": 0.5, "correct": False, "parts": {"format": 0.5}}
    file = ParquetFile(tmp_path / "x.parquet")
    file.write([])  # the share of a set that has run out
    file.write([{**base, "prompt": [{"role": "user", "content": "é"}], "completion": "\ud83d\x00"}])
    file.write([{**base, "prompt": "p", "completion": "", "level": 1}, {**base, "level": "high"}])
    file.close()
    rows = parquet.read_table(file.path).to_pylist()
    assert json.loads(rows[0]["prompt"])[0]["content"] == "é"
    assert rows[0]["completion"] == "?\x00" and rows[0]["parts"] == [("format", 0.5)]
    assert [json.loads(row["row"]) for row in rows[1:]] == [{"level": 1}, {"level": "high"}]
    assert file.rows == len(rows) == 3


CLASHING = {
    **{"set": 7, "index": "q-17", "sample": "s", "completion": "theirs", "answer_found": None},
    **{"reward": 0.25, "parts": [1], "correct": "maybe", "truncated": 3, "length": "long"},
    **{"row": {"x": 1}, "level": 3},
}


@pytest.mark.parametrize("name", ["", "a"])
def test_columns_called_like_ours_are_kept_in_row(
    tmp_path: Path, student_folder: str, name: str
) -> None:
    from pyarrow import parquet

    rows = [{"prompt": "1+2=", "answer": "3", **CLASHING}, {"prompt": "2+2=", "answer": "4"}]
    hidden = {key: value for key, value in CLASHING.items() if key != "level"}
    for writer in (PredictionWriter(), PredictionWriter("parquet")):
        trainer = make_trainer(tmp_path, callbacks=[writer])
        data = make_data(val_prompts={name: EvalSet(rows)} if name else rows)
        made = trainer.predict(make_module(student_folder, None, GRPO()), datamodule=data)
        first, second = (row for batch in made or [] for row in batch)
        assert first["row"] == hidden and first["level"] == 3 and "row" not in second
        assert (first["index"], first["sample"]) == (0, 0)
        assert type(first["reward"]) is float and first["completion"] != "theirs"
        assert first.get("set") == (name or None) and type(first["length"]) is int
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert written[0]["row"] == hidden and [row["index"] for row in written] == [0, 1]
    table = parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert json.loads(table[0]["row"]) == {"answer": "3", **CLASHING}
    assert json.loads(table[1]["row"]) == {"answer": "4"}
    assert [row["set"] for row in table] == [name or None] * 2


def test_json_takes_the_types_of_data_sets(tmp_path: Path) -> None:
    file = JSONLFile(tmp_path / "x.jsonl")
    values: dict[Any, Any] = {
        "nan": float("nan"),
        "inf": float("inf"),
        "numpy": np.float32("nan"),
        "int": np.int64(3),
        "array": np.arange(2000),
        "bytes": b"caf\xc3\xa9",
        "set": {1},
        "tuple": (1, None),
        "date": datetime.date(2024, 1, 2),
        "half": "\ud83d\x00",
        ("a", 1): {2: True},
    }
    file.write([values])
    file.close()

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    assert json.loads(file.path.read_text(), parse_constant=refuse) == {
        "nan": None,
        "inf": "inf",
        "numpy": None,
        "int": 3,
        "array": list(range(2000)),
        "bytes": "café",
        "set": [1],
        "tuple": [1, None],
        "date": "2024-01-02",
        "half": "\ud83d\x00",
        "('a', 1)": {"2": True},
    }


def test_what_the_writer_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"`format` must be jsonl or parquet: got xml\."):
        PredictionWriter("xml")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigurationError) as caught:
        ParquetFile(tmp_path / "x.parquet")
    assert str(caught.value) == (
        "`format` must be jsonl if pyarrow is not installed: got parquet. "
        "Install it: pip install 'kdrl_lightning[tasks]'."
    )


def test_the_command_line_keeps_nothing_in_memory(
    tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.loops.prediction_loop import _PredictionLoop

    kept: list[Any] = []
    end = _PredictionLoop.on_run_end
    monkeypatch.setattr(
        _PredictionLoop, "on_run_end", lambda loop: (kept.append(loop.predictions), end(loop))[1]
    )
    monkeypatch.chdir(tmp_path)
    prompts = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 4}}
    data = {"val_prompts": prompts, "train_prompts": prompts, "max_tokens": 4}
    data["reward"] = "kdrl_lightning.tiny.addition_reward"
    main(
        [
            "predict",
            f"--model.student={student_folder}",
            "--model.objective=GRPO",
            f"--data={json.dumps(data)}",
            "--trainer.accelerator=cpu",
        ]
    )
    assert kept == [[]]
    (file,) = tmp_path.glob("runs/kdrl_lightning/version_0/predictions.jsonl")
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]
