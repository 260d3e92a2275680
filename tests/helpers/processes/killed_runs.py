"""Runs in separate processes, which kill themselves at a chosen moment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from helpers.processes.ready import run

ROOT = Path(__file__).parents[3]
STEPS = 12
# A module for runs that kills its process at a chosen moment, as a user's machine may.
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


def prepare(folder: Path, models: tuple[str, str]) -> tuple[list[str], dict[str, str]]:
    """Write a run into a separate folder; return its arguments and its environment."""
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
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    return ["fit", "--config", "run.yaml"], {**env, "MPLBACKEND": "agg"}


def start(folder: Path, models: tuple[str, str], *flags: str) -> subprocess.Popen[str]:
    """Start fit in a separate process group, as a shell does."""
    arguments, env = prepare(folder, models)
    return subprocess.Popen(
        [sys.executable, "-m", "kdrl_lightning", *arguments, *flags],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def fit(folder: Path, models: tuple[str, str], *flags: str, code: int = 0) -> tuple[str, str]:
    """Run fit to its end; return its output and its errors."""
    arguments, env = prepare(folder, models)
    ended = run([*arguments, *flags], folder, env)
    assert ended.returncode == code, ended.stderr[-3000:]
    return ended.stdout, ended.stderr


def killer(at: str, number: int = 9, rank: int = -1) -> str:
    arguments = f'"at": "{at}", "number": {number}, "rank": {rank}'
    return f'--trainer.callbacks+={{"class_path": "killer.Killer", "init_args": {{{arguments}}}}}'
