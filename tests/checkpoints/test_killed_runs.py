"""Real processes that are killed or stopped at any moment and resumed end with equal results."""

from __future__ import annotations

import csv
import os
import re
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.processes.killed_runs import STEPS, fit, killer

CLOCKS = ("time/", "memory/", "tokens_per_s")


def student(folder: Path) -> Path:
    newest = max((folder / "runs/kdrl_lightning").glob("version_*/student"), key=os.path.getmtime)
    return newest / "model.safetensors"


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, student_folder: str, teacher_folder: str
) -> Path:
    """A run that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, (student_folder, teacher_folder), killer(""))
    return folder


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """Return the logged numbers of a run's starts by step; what a clock decides is left out."""
    out: dict[str, dict[str, str]] = {}
    files = (folder / "runs/kdrl_lightning").glob("version_*/metrics.csv")
    for path in sorted(files, key=os.path.getmtime):
        with path.open() as file:
            for row in csv.DictReader(file):
                kept = {k: v for k, v in row.items() if v and not k.startswith(CLOCKS)}
                out.setdefault(row["step"], {}).update(kept)
    return out


def samples(folder: Path, rank: int = 0) -> list[str]:
    return (folder / f"samples-{rank}.jsonl").read_text().splitlines()


def test_killed_again_and_again_it_ends_as_if_it_never_was(
    tmp_path: Path, whole: Path, student_folder: str, teacher_folder: str
) -> None:
    models, last = (student_folder, teacher_folder), "--ckpt_path=last"
    # Before the first checkpoint; then while the second is written.
    for moment in ("step:2", "half:8"):
        fit(tmp_path, models, last, killer(moment), code=-signal.SIGKILL)
    halves = list((tmp_path / "runs").rglob("*.unfinished"))
    assert [h.name for h in halves] == ["step=00000008.ckpt.unfinished"]
    # Stopped in the middle of a rollout, and killed in the next.
    out, err = fit(tmp_path, models, last, killer("start:5", signal.SIGTERM), code=143)
    assert "step=00000004.ckpt at step 4" in out
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    words = (
        r"error: stopped by SIGTERM after step 6: saved (\S+step=00000006\.ckpt)\. Continue with"
    )
    found = re.match(words, line)
    assert found and (tmp_path / found[1]).exists()
    out, _ = fit(tmp_path, models, last, killer(""))
    assert "continuing from" in out and "step=00000006.ckpt at step 6" in out
    assert student(tmp_path).read_bytes() == student(whole).read_bytes()
    assert set(samples(tmp_path)) == set(samples(whole)) and len(samples(whole)) == STEPS
    assert rows(tmp_path) == rows(whole) and len(rows(whole)) == STEPS


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_killed_stopped_and_gone_on_with_by_one(
    tmp_path: Path, whole: Path, student_folder: str, teacher_folder: str, strategy: str
) -> None:
    two = (f"--trainer.strategy={strategy}", "--trainer.devices=2")
    models, last = (student_folder, teacher_folder), "--ckpt_path=last"
    never, killed = tmp_path / "never", tmp_path / "killed"
    fit(never, models, *two, killer(""))
    fit(killed, models, *two, killer("step:6"), code=-signal.SIGKILL)
    began = time.monotonic()
    _, err = fit(killed, models, *two, last, killer("start:8", signal.SIGTERM, rank=1), code=143)
    assert time.monotonic() - began < 120
    assert "stopped by SIGTERM after step 9: saved " in err
    path = next((killed / "runs").rglob("step=00000009.ckpt"))
    fit(killed, models, *two, f"--ckpt_path={path}", killer(""))
    assert student(killed).read_bytes() == student(never).read_bytes()
    assert [set(samples(killed, r)) for r in (0, 1)] == [set(samples(never, r)) for r in (0, 1)]
    assert rows(killed) == rows(never) and len(rows(never)) == STEPS
    # From two processes to one: what was sampled before is used, and the rest is sampled alike.
    alone = tmp_path / "alone"
    one = () if strategy == "ddp" else (two[0], "--trainer.devices=1")
    fit(alone, models, *one, f"--ckpt_path={path}", killer(""))
    assert samples(alone) == samples(whole)[9:]
    ours, theirs = load_file(student(alone)), load_file(student(never))
    begun = load_file(Path(student_folder) / "model.safetensors")
    for name, tensor in ours.items():
        change = (tensor - begun[name]).norm()
        assert change > 0 and (tensor - theirs[name]).norm() <= 1e-3 * change, name
