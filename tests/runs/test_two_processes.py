"""Two real processes under ddp: the same completions, losses and weights as one process."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def fit(folder: Path, student: str, teacher: str, *flags: str) -> Path:
    """Run fit in a folder of its own; return the run folder."""
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
    (folder / "two_rewards.py").write_text(
        "def odd_length(sample):\n    return float(len(sample.ids) % 2)\n"
    )
    out = subprocess.run(
        [sys.executable, "-m", "kdrl_lightning", "fit", "--config", "run.yaml", *flags],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{folder}:{folder.parent}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return folder / "runs/kdrl_lightning/version_0"


def test_a_reward_that_fails_on_one_rank_stops_both(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    (tmp_path / "sick_rank.py").write_text(
        "import os\n\n\ndef reward(sample):\n"
        "    sick = os.environ.get('LOCAL_RANK') == '1'\n"
        "    return 1 / 0 if sick and sample.text not in ('', sample.row['prompt']) else 1.0\n"
    )
    with pytest.raises(AssertionError, match=r"another process had to stop|the reward failed on"):
        fit(
            tmp_path / "run",
            student_folder,
            teacher_folder,
            "--data.reward=sick_rank.reward",
            "--data.val_prompts=null",
            "--trainer.max_steps=2",
            "--trainer.strategy=ddp",
            "--trainer.devices=2",
        )


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row.get("loss/total")]


@pytest.mark.parametrize("steps", [1, 4])
def test_ddp_equals_one_process(
    tmp_path: Path, student_folder: str, teacher_folder: str, steps: int
) -> None:
    limit = f"--trainer.max_steps={steps}"
    one = fit(tmp_path / "one", student_folder, teacher_folder, limit)
    two = fit(
        tmp_path / "two",
        student_folder,
        teacher_folder,
        limit,
        "--trainer.strategy=ddp",
        "--trainer.devices=2",
    )
    # transformers' RMSNorm rounds to float32 inside: later steps are equal only to that.
    tolerance = 1e-10 if steps == 1 else 1e-6
    ours = load_file(one / "student/model.safetensors")
    theirs = load_file(two / "student/model.safetensors")
    start = load_file(Path(student_folder) / "model.safetensors")
    for name, tensor in ours.items():
        change = (tensor - start[name]).norm()
        assert tensor.dtype == torch.float64 and change > 0, name
        assert (tensor - theirs[name]).norm() <= tolerance * change, name
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss/total", "loss/teacher_kl", "kd/reverse_kl", "policy/grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5), name
        for name in ("reward/mean", "rollout/length_mean", "rollout/flat_group_frac"):
            assert a[name] == b[name], name
    accuracy = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    assert accuracy[0]["student_accuracy_before"] == accuracy[1]["student_accuracy_before"]


def test_teacher_completions_and_full_vocabulary_equal_one_process(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    local = {"class_path": "LocalTeacher", "init_args": {"model": teacher_folder}}
    local["init_args"]["dtype"] = "float64"  # type: ignore[index]
    cached = {"class_path": "CachedTeacher", "init_args": {"teacher": local, "path": "scores.db"}}
    flags = [
        f"--model.teacher={json.dumps(cached)}",
        "--model.objective.kl_estimator=full_vocabulary",
        "--model.objective.teacher_tokens=BehaviorRatio",
        "--data.teacher_completions.count=2",
        "--data.rollout.max_refills=1",
        "--data.val_prompts=null",
        "--trainer.max_steps=1",
    ]
    two_ranks = ("--trainer.strategy=ddp", "--trainer.devices=2")
    one = fit(tmp_path / "one", student_folder, teacher_folder, *flags)
    two = fit(tmp_path / "two", student_folder, teacher_folder, *flags, *two_ranks)
    ours = load_file(one / "student/model.safetensors")
    theirs = load_file(two / "student/model.safetensors")
    start = load_file(Path(student_folder) / "model.safetensors")
    for name, tensor in ours.items():
        change = (tensor - start[name]).norm()
        assert change > 0, name
        assert (tensor - theirs[name]).norm() <= 1e-10 * change, name
    (a,), (b,) = metrics(one), metrics(two)
    names = [n for n in a if n.startswith(("loss/", "kd/", "reward/", "teacher/", "rollout/"))]
    names.remove("rollout/padding_frac")  # depends on how the rows are dealt out
    assert {"loss/teacher_kl", "kd/imitated_groups_frac", "teacher/reward_mean"} <= set(names)
    for name in names:
        # Engine and trainer differ by float32 rounding, so their gap is nearly nothing.
        near = pytest.approx(float(b[name]), rel=1e-5, abs=1e-6)
        assert float(a[name]) == near, name
