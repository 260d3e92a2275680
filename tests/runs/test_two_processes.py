"""Two real processes under ddp: the same completions, losses and weights as one process."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.processes.ready import run

ROOT = Path(__file__).parents[2]
# What the run imports by name.
TWO_REWARDS = """
import lightning.pytorch as pl

from kdrl_lightning.callbacks import imitation_stats, report

# Pictures are tested elsewhere.
report.plot_curves = imitation_stats.plot_imitation = lambda *_: None


def odd_length(sample):
    return float(len(sample.ids) % 2)


class KeepsTheFirstStep(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            module.export("runs/kdrl_lightning/version_0/first")
"""


def fit(folder: Path, student: str, teacher: str, *flags: str) -> Path:
    """Run fit in a separate folder; return the run folder."""
    folder.mkdir()
    prompts = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 9}}
    config = {
        "model": {
            "student": student,
            "teacher": {
                "class_path": "LocalTeacher",
                "init_args": {"model": teacher, "dtype": "float64"},
            },
            "objective": {"class_path": "KDRL", "init_args": {"teacher_kl_coef": 0.5}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        },
        "data": {
            "train_prompts": prompts,
            "val_prompts": prompts,
            "reward": "two_rewards.odd_length",
            "rollout": {
                "prompts_per_rollout": 4,
                "group_size": 4,
                "max_tokens": 20,
                "minibatches_per_rollout": 2,
                "mask_truncated": True,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "precision": "64-true",
            "accumulate_grad_batches": 2,
            "callbacks": [{"class_path": "CPUThreads"}],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "two_rewards.py").write_text(TWO_REWARDS)
    paths = f"{ROOT}:{folder}:{folder.parent}"
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    out = run(["fit", "--config", "run.yaml", *flags], folder, env)
    assert out.returncode == 0, out.stderr[-3000:]
    return folder / "runs/kdrl_lightning/version_0"


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row.get("loss/total")]


def test_ddp_equals_one_process(tmp_path: Path, student_folder: str, teacher_folder: str) -> None:
    flags = (
        "--trainer.max_steps=4",
        '--trainer.callbacks+={"class_path": "two_rewards.KeepsTheFirstStep"}',
    )
    one = fit(tmp_path / "one", student_folder, teacher_folder, *flags)
    two_ranks = ("--trainer.strategy=ddp", "--trainer.devices=2")
    two = fit(tmp_path / "two", student_folder, teacher_folder, *flags, *two_ranks)
    start = load_file(Path(student_folder) / "model.safetensors")
    # transformers' RMSNorm rounds to float32 inside: later steps are equal only to that.
    for file, tolerance in (("first", 1e-10), ("student", 1e-6)):
        ours = load_file(one / file / "model.safetensors")
        theirs = load_file(two / file / "model.safetensors")
        for name, tensor in ours.items():
            change = (tensor - start[name]).norm()
            assert tensor.dtype == torch.float64 and change > 0, name
            assert (tensor - theirs[name]).norm() <= tolerance * change, name
    assert len(metrics(one)) == 4
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss/total", "loss/teacher_kl", "kd/reverse_kl", "policy/grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5), name
        for name in ("reward/mean", "rollout/length_mean", "rollout/flat_group_frac"):
            assert a[name] == b[name], name
    accuracy = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    assert accuracy[0]["student_accuracy_before"] == accuracy[1]["student_accuracy_before"]
