"""Whole runs with vLLM in the training process, started as a user starts them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from helpers.with_vllm.need import ROOT, need_vllm, run

ENGINE = [f"--config={ROOT / 'configs/rlad.yaml'}", f"--config={ROOT / 'configs/engine/vllm.yaml'}"]
SMALL = ["--data.rollout.prompts_per_rollout=8", "--data.val_prompts.size=16"]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row.get("loss/total")]


@pytest.fixture(autouse=True)
def _vllm() -> None:
    need_vllm()


def test_rlad_learns_on_vllms_rollouts(tmp_path: Path) -> None:
    # A quarter of the whole run: by then the transformers engine has the student above 0.95.
    flags = ["--trainer.max_steps=80", "--report.evaluate_teacher=false"]
    flags += ["--data.val_prompts.size=64"]
    out = run(["kdrl_lightning", "fit", *ENGINE, *flags], tmp_path, timeout=280)
    assert out.returncode == 0, out.stderr[-3000:]
    folder = tmp_path / "runs/rlad/version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["student_accuracy_before"] < 0.3
    assert summary["student_accuracy_after"] >= 0.9
    steps = rows(folder)
    assert len(steps) == 80
    for row in steps:
        assert row["rollout/staleness"] == "0.0"
        # Not exact, so not 0; in float32 nearly so.
        assert 0.0 < float(row["rollout/logprob_diff_max"]) < 1e-3
        assert abs(float(row["rollout/mismatch_kl"])) < 1e-8


def test_two_processes_with_an_engine_each_are_one(tmp_path: Path) -> None:
    found = []
    flags = ["--trainer.max_steps=8", "--report.evaluate_teacher=false", "--report.export=false"]
    for name in ("auto", "ddp", "fsdp2"):
        more = [f"--trainer.strategy={name}", f"--trainer.devices={1 if name == 'auto' else 2}"]
        (tmp_path / name).mkdir()
        command = ["kdrl_lightning", "fit", *ENGINE, *SMALL, *flags, *more]
        out = run(command, tmp_path / name, timeout=280)
        assert out.returncode == 0, out.stderr[-3000:]
        found.append(rows(tmp_path / name / "runs/rlad/version_0"))
    one, *others = found
    for two in others:
        assert len(one) == len(two) == 8
        for a, b in zip(one, two, strict=True):
            # The same tokens were sampled, whatever the process; the sums differ by rounding.
            for key in ("loss/total", "reward/mean", "rollout/length_mean", "policy/grad_norm"):
                if a[key]:
                    assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-3, abs=1e-5), key
        assert float(two[4]["rollout/logprob_diff_max"]) < 1e-3


def test_an_engine_with_old_weights_stops_the_run(tmp_path: Path) -> None:
    flags = [
        "--data.rollout_engine.class_path=helpers.with_vllm.old_weights.OldWeights",
        "--trainer.max_steps=8",
    ]
    more = ["--report.evaluate_teacher=false", "--trainer.num_sanity_val_steps=0"]
    command = ["kdrl_lightning", "fit", *ENGINE, *SMALL, *flags, *more]
    out = run(command, tmp_path, timeout=280)
    assert out.returncode == 1, out.stderr[-3000:]
    last = out.stderr.strip().splitlines()[-1]
    assert "must agree with the trainer's within 0.001 nats on average: got" in last
    assert "at step 4. They differ most at token" in last
    assert "The engine has different weights" in last
