"""Real processes, killed or stopped at any moment: what comes out at the end is the same."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
STEPS = 12
CLOCKS = ("time/", "memory/", "tokens_per_s")
# Kills its process at chosen moments: what a user's own machine may do.
KILLER = """
import json, os, signal

import lightning.pytorch as pl

from kdrl_lightning.callbacks import imitation_stats, report

# Pictures are tested elsewhere, and take time in each of these runs.
report.plot_curves = imitation_stats.plot_imitation = lambda *_: None


def odd_length(sample):
    return float(len(sample.ids) % 2)


def die(group):
    os.killpg(0, signal.SIGKILL) if group else os.kill(os.getpid(), signal.SIGKILL)


class Killer(pl.Callback):
    def __init__(self, at: str = "", number: int = 9, rank: int = -1):
        self.at, self.number, self.rank = at, number, rank
        place, _, step = at.partition(":")
        if place == "half":  # between the bytes and the rename
            replace = os.replace
            def cut(old, new):
                if f"step={int(step):08d}" in str(new):
                    with open(old, "r+b") as file:
                        file.truncate(os.path.getsize(old) // 2)
                    die(True)
                replace(old, new)
            os.replace = cut

    def due(self, place, trainer):
        mine = self.rank in (-1, trainer.global_rank)
        return mine and self.at == f"{place}:{trainer.global_step}"

    def act(self, place, trainer):
        if self.due(place, trainer):
            die(True) if self.number == 9 else os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.act("start", trainer)
        rows = sorted(
            (batch.input_ids[i, : n].tolist(), int(batch.policy_version[i]))
            for i, n in enumerate(batch.lengths.tolist())
        )
        with open(f"samples-{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([trainer.global_step, rows]) + "\\n")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.act("step", trainer)

"""


def start(folder: Path, models: tuple[str, str], *flags: str) -> subprocess.Popen[str]:
    """Start fit in a folder of its own, in a process group of its own."""
    folder.mkdir(exist_ok=True)
    prompts = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 9}}
    teacher = {"class_path": "LocalTeacher", "init_args": {"model": models[1]}}
    config = {
        "model": {
            "student": models[0],
            "teacher": teacher,
            "objective": {"class_path": "KDRL", "init_args": {"teacher_kl_coef": 0.5}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
        },
        "data": {
            "train_prompts": prompts,
            "val_prompts": prompts,
            "reward": "killer.odd_length",
            "rollout": {
                "prompts_per_rollout": 4,
                "group_size": 4,
                "max_tokens": 12,
                "minibatches_per_rollout": 2,
                "epochs_per_rollout": 2,
                "rollouts_per_epoch": 2,
            },
        },
        "trainer": {"accelerator": "cpu", "max_steps": STEPS, "callbacks": [
            {"class_path": "CPUThreads"}]},
        "report": {"evaluate_teacher": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "killer.py").write_text(KILLER)
    return subprocess.Popen(
        [sys.executable, "-m", "kdrl_lightning", "fit", "--config", "run.yaml", *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1",
             "MPLBACKEND": "agg"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip


def fit(folder: Path, models: tuple[str, str], *flags: str, code: int = 0) -> tuple[str, str]:
    """Run fit to its end; return its output and its errors."""
    process = start(folder, models, *flags)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, err[-3000:]
    return out, err


def killer(at: str, number: int = 9, rank: int = -1) -> str:
    arguments = f'"at": "{at}", "number": {number}, "rank": {rank}'
    return f'--trainer.callbacks+={{"class_path": "killer.Killer", "init_args": {{{arguments}}}}}'


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
