"""Two real processes with odd numbers of prompts evaluate exactly as one process does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from helpers.processes.two_ranks import TwoRanks
from helpers.processes.two_ranks_driver import run, sets


def test_two_processes_say_what_one_says(
    tmp_path: Path, two_ranks: TwoRanks, student_folder: str
) -> None:
    from pyarrow import parquet

    both = two_ranks("two_ranks")
    shutil.copytree(student_folder, tmp_path / "student")
    run(tmp_path, 1, "auto", "jsonl")
    one, ddp, fsdp2 = (
        json.loads((folder / "metrics.json").read_text())
        for folder in (tmp_path / "auto1", both / "ddp2", both / "fsdp22")
    )
    assert one == ddp == fsdp2
    assert {"val/seven/pass_at_2", "test/seven/majority_at_3", "val/five/accuracy_high"} <= set(one)
    assert 0 < one["val/seven/accuracy"] < 1
    lines = (tmp_path / "auto1/predictions.jsonl").read_text()
    assert lines == (both / "ddp2/predictions.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [(row["set"], row["index"], row["sample"]) for row in rows] == [
        (name, index, sample)
        for name, one_set in sets().items()
        for index in range(len(one_set.prompts))
        for sample in range(one_set.samples or 1)
    ]
    table = parquet.read_table(both / "fsdp22/predictions.parquet").to_pylist()
    assert [row["completion"] for row in table] == [row["completion"] for row in rows]
