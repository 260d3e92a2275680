"""Starts the small runs into which faults are injected, and compares two runs."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
STEPS, UPDATES = 12, 4  # per run, and per rollout
PATIENCE = 300.0  # seconds until a run counts as hanging
STRATEGIES: dict[str, tuple[str, ...]] = {
    "single": (),
    "ddp": ("--trainer.strategy=ddp", "--trainer.devices=2"),
    "fsdp2": ("--trainer.strategy=fsdp2", "--trainer.devices=2"),
}
# Values that depend on a clock or a cache.
LEFT_OUT = ("time/", "memory/", "tokens_per_s")
HELPERS = '''
import os
from pathlib import Path

import lightning.pytorch as pl

from kdrl_lightning.callbacks import imitation_stats, report

report.plot_curves = imitation_stats.plot_imitation = lambda *_: None  # pictures take time


def odd_length(sample):
    return float(len(sample.ids) % 2)


class Mark(pl.Callback):
    """Writes each step that was begun to a file, for whoever chooses the moment of a fault."""

    def note(self, trainer, word):
        if trainer.is_global_zero:
            with open(os.environ["FAULT_MARKS"], "a") as file:
                file.write(f"{word} {trainer.global_step}\\n")

    def on_train_start(self, trainer, module):
        self.note(trainer, "start")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.note(trainer, "step")

    def on_fit_end(self, trainer, module):
        self.note(trainer, "end")
'''


def save_models(folder: Path) -> tuple[str, str]:
    """Write a random student and a random teacher."""
    from kdrl_lightning.tiny.models import Recipe, save_untrained

    recipe = Recipe(width=64, layers=1, steps=1, lr=1e-3, muon=False)
    for seed, name in enumerate(("student", "teacher")):
        if not (folder / name / "config.json").exists():
            save_untrained(recipe, folder / name, seed=seed)
    return str(folder / "student"), str(folder / "teacher")


@dataclass
class Run:
    """A run of ``fit`` in a separate folder; each start after the first continues it.

    Attributes:
        folder: the run's working directory.
        strategy: key of ``STRATEGIES``.
        models: folders of student and teacher.
        flags: more flags of each start.
    """

    folder: Path
    strategy: str
    models: tuple[str, str]
    flags: tuple[str, ...] = ()
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start the run, or continue it from the last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "run.yaml").write_text(yaml.safe_dump(configuration(*self.models)))
        (self.folder / "helpers.py").write_text(HELPERS)
        self.marks.unlink(missing_ok=True)
        # Write to files: a full pipe would block the run.
        self.out = self.beside("out").open("w")
        self.err = self.beside("err").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kdrl_lightning", "fit", "--config", "run.yaml",
             "--ckpt_path=last", *STRATEGIES[self.strategy], *self.flags],
            cwd=self.folder, stdout=self.out, stderr=self.err, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{self.folder}", "OMP_NUM_THREADS": "1",
                 "HF_HUB_OFFLINE": "1", "FAULT_MARKS": str(self.marks)},
        )  # fmt: skip

    @property
    def marks(self) -> Path:
        """File in which the run notes its steps."""
        return self.beside("marks")

    def beside(self, word: str) -> Path:
        """Return a file outside the run's folder, which may be on a full disk."""
        return self.folder.parent / f"{self.folder.name}-{word}.txt"

    def steps(self) -> list[int]:
        """Return the steps that this start has begun."""
        lines = self.marks.read_text().splitlines() if self.marks.exists() else []
        return [int(line.split()[1]) for line in lines if line.startswith("step ")]

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
        """Wait for a condition; return False if the run ended before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.process is None or self.process.poll() is not None:
                return bool(condition())
            time.sleep(0.005)
        self.kill()
        raise TimeoutError(f"{self} took more than {seconds:g} s")

    def alive(self) -> bool:
        """Return whether the first process is still running."""
        return self.process is not None and self.process.poll() is None

    def ranks(self) -> list[int]:
        """Return the processes of all ranks, rank 0 first."""
        assert self.process is not None
        return [self.process.pid, *children(self.process.pid)]

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for the end; return the exit code, 99 for a run that hangs."""
        assert self.process is not None
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = 99
        self.kill()
        return code

    def signal(self, number: int, one: int | None = None) -> None:
        """Send a signal to all processes of the run, or to one of its ranks."""
        assert self.process is not None
        try:
            if one is None:
                os.killpg(self.process.pid, number)
            else:
                ranks = self.ranks()
                os.kill(ranks[one % len(ranks)], number)
        except ProcessLookupError:
            pass

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop all processes of the run inside the block."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill all processes that are left of the run."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.out.close()
            self.err.close()

    def last_line(self) -> str:
        """Return the last line that the run wrote for its user; the ranks share a screen."""
        lines = [x for x in self.beside("err").read_text().splitlines() if x.strip()]
        errors = [x for x in lines if x.startswith("error: ") and "another process" not in x]
        return next(reversed(errors or lines), "")

    def traceback(self) -> bool:
        """Return whether the run ended with a traceback."""
        return "Traceback (most recent call last)" in self.beside("err").read_text()

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints of all its starts, by step."""
        return sorted(self.folder.rglob("step=*.ckpt"), key=lambda p: step_of(p))

    def student(self) -> bytes:
        """Return the newest exported weights."""
        found = list(self.folder.rglob("student/model.safetensors"))
        return max(found, key=os.path.getmtime).read_bytes() if found else b""

    def rows(self) -> dict[int, dict[str, str]]:
        """Return the logged numbers by step; the later ones for a repeated step."""
        rows: dict[int, dict[str, str]] = {}
        for path in sorted(self.folder.rglob("metrics.csv"), key=os.path.getmtime):
            with path.open() as file:
                for row in csv.DictReader(file):
                    kept = {k: v for k, v in row.items() if v and not k.startswith(LEFT_OUT)}
                    rows.setdefault(int(row["step"]), {}).update(kept)
        return rows

    def same_as(self, other: Run) -> str:
        """Compare with an undisturbed run; return what differs."""
        if not self.student() or self.student() != other.student():
            return "student"
        ours, theirs = self.rows(), other.rows()
        for step in sorted(ours.keys() | theirs.keys()):
            a, b = ours.get(step, {}), theirs.get(step, {})
            names = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
            if names:
                return f"step {step}: {names[0]} {a.get(names[0])} instead of {b.get(names[0])}"
        return ""


def step_of(path: Path) -> int:
    """Return a checkpoint's step."""
    found = re.search(r"step=(\d+)", path.name)
    return int(found[1]) if found else 0


def children(process: int) -> list[int]:
    """Return the ranks that a process has started."""
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [p for p in map(int, found) if b"kdrl_lightning\0fit" in command(p)]
    except OSError:
        return []


def running(process: int) -> bool:
    """Return whether a process is still running."""
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def command(process: int) -> bytes:
    """Return a process's command line."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def configuration(student: str, teacher: str) -> dict[str, Any]:
    """Return settings: 3 rollouts of 4 updates, a checkpoint after each, one validation."""
    prompts = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 9}}
    return {
        "model": {
            "student": student,
            "teacher": {"class_path": "LocalTeacher", "init_args": {"model": teacher}},
            "objective": {"class_path": "KDRL", "init_args": {"teacher_kl_coef": 0.5}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
        },
        "data": {
            "train_prompts": prompts,
            "val_prompts": prompts,
            "reward": "helpers.odd_length",
            "rollout": {
                "prompts_per_rollout": 4,
                "group_size": 4,
                "max_tokens": 12,
                "minibatches_per_rollout": 2,
                "epochs_per_rollout": 2,
                "rollouts_per_epoch": 2,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "callbacks": [{"class_path": "CPUThreads"}, {"class_path": "helpers.Mark"}],
        },
        "report": {"evaluate_teacher": False},
        "checkpoint": {"keep_last": 2},
    }
