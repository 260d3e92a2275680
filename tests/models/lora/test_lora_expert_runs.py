"""Whole runs of students with adapters on fused experts: resume, export, shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.moe_models import logprobs, save
from helpers.resumed_runs import Setting, run, same_batches, same_weights
from kdrl_lightning import KDRL, AdapterOffTeacher, LoRA
from kdrl_lightning.cli.export import export
from kdrl_lightning.models.loading import load_causal_lm

IDS = torch.arange(6, 30)[None]


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the (completions|groups):UserWarning",
    "ignore:The number of training batches:UserWarning",
    "ignore:torch.distributed is .*:UserWarning",
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
    "ignore:.*cannot be read in parts:UserWarning",
)


def setting(student: str, **trainer: Any) -> Setting:
    return Setting(
        student,
        AdapterOffTeacher(),
        lambda: KDRL(0.5, ref_kl_coef=0.1),
        {"val_prompts": None},
        {"max_steps": 4, **trainer},
        lora=lambda: LoRA(2),
    )


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe", "gpt_oss"])
def test_a_run_goes_on_and_its_export_is_the_student(
    name: str, tmp_path: Path, student_folder: str
) -> None:
    student = save(name, tmp_path / "student", student_folder)
    whole = run(tmp_path / "whole", setting(student), save="steps")
    rest = run(tmp_path / "rest", setting(student), whole.checkpoints[3])
    same_batches(whole.seen[3:], rest.seen)
    same_weights(whole.weights(), rest.weights())
    export(whole.checkpoints[4], str(tmp_path / "merged"))
    merged = load_causal_lm(str(tmp_path / "merged"))
    model = whole.module.student.model
    torch.testing.assert_close(logprobs(merged, IDS), logprobs(model, IDS), rtol=0, atol=1e-5)
    base = dict(load_causal_lm(student).named_parameters())
    moved = {n for n, t in merged.named_parameters() if not torch.equal(t, base[n])}
    assert {n for n in base if n.endswith(("experts.gate_up_proj", "experts.down_proj"))} <= moved
    assert not {n for n in moved if "norm" in n or "gate.weight" in n or "router" in n}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_shards_of_experts_train_as_whole_ones_do(
    name: str, tmp_path: Path, student_folder: str
) -> None:
    student = save(name, tmp_path / "student", student_folder)
    sharded = {"strategy": "fsdp2_full", "devices": 1}
    try:
        whole = run(tmp_path / "one", setting(student), save="steps")
        spread = run(tmp_path / "full", setting(student, **sharded), save="steps")
        back = run(tmp_path / "back", setting(student), spread.checkpoints[2])
        to = run(tmp_path / "to", setting(student, **sharded), whole.checkpoints[2])
        for other in (spread, back, to):
            for key, tensor in whole.weights().items():
                torch.testing.assert_close(other.weights()[key], tensor, rtol=0, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()
