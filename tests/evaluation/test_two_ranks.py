"""Two real processes with odd numbers of prompts: what one process says, exactly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.processes.two_ranks_driver import run, sets

ROOT = Path(__file__).parents[2]


def test_two_processes_say_what_one_says(tmp_path: Path, student_folder: str) -> None:
    from pyarrow import parquet

    shutil.copytree(student_folder, tmp_path / "student")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    driver = [
        str(ROOT / "tests/helpers/processes/two_ranks_driver.py"),
        str(tmp_path),
        "2",
        "ddp",
        "fsdp2",
    ]
    out = subprocess.run(
        [sys.executable, *launcher, *driver],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr[-4000:]
    run(tmp_path, 1, "auto", "jsonl")
    one, ddp, fsdp2 = (
        json.loads((tmp_path / name / "metrics.json").read_text())
        for name in ("auto1", "ddp2", "fsdp22")
    )
    assert one == ddp == fsdp2
    assert {"val/seven/pass_at_2", "test/seven/majority_at_3", "val/five/accuracy_high"} <= set(one)
    assert 0 < one["val/seven/accuracy"] < 1
    lines = (tmp_path / "auto1/predictions.jsonl").read_text()
    assert lines == (tmp_path / "ddp2/predictions.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [(row["set"], row["index"], row["sample"]) for row in rows] == [
        (name, index, sample)
        for name, one_set in sets().items()
        for index in range(len(one_set.prompts))
        for sample in range(one_set.samples or 1)
    ]
    table = parquet.read_table(tmp_path / "fsdp22/predictions.parquet").to_pylist()
    assert [row["completion"] for row in table] == [row["completion"] for row in rows]
