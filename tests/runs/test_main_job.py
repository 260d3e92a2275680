"""``configs/rlad.yaml`` as a user starts it, and on another model and other prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kdrl_lightning.__main__ import main
from kdrl_lightning.tiny.models import make_tokenizer

ROOT = Path(__file__).parents[2]


def fit(*flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kdrl_lightning", "fit", *flags],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_rlad_learns_the_embedded_task(tmp_path: Path) -> None:
    out = fit("--config", str(ROOT / "configs/rlad.yaml"), cwd=tmp_path)
    assert out.returncode == 0, out.stderr[-2000:]
    folder = tmp_path / "runs/rlad/version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["student_accuracy_before"] < 0.25
    assert summary["student_accuracy_after"] >= 0.85
    assert summary["teacher_accuracy"] > 0.98
    assert (summary["method"], summary["seed"], summary["rollouts"]) == ("RLAD", 0, 80)
    assert {p.name for p in folder.iterdir()} == {
        ".run",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "imitation.png",
        "samples.html",
        "metrics.csv",
        "student",
        "summary.json",
    }
    assert list((folder / "checkpoints").glob("*.ckpt"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / summary["export_path"])
    assert sum(p.numel() for p in model.parameters()) > 200_000
    assert "student after" in out.stdout and "320 steps = 80 rollouts" in out.stdout


def llama(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=96,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


# A random model stops late and is rarely right.
@pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
def test_another_model_and_prompt_source_run_the_same_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prompts = [
        "--data.{0}_prompts=JSONLPrompts",
        "--data.{0}_prompts.path=rows.jsonl",
        "--data.{0}_prompts.prompt_column=question",
    ]
    flags = [
        f"--config={ROOT / 'configs/rlad.yaml'}",
        f"--model.student={llama(tmp_path / 'student', 0)}",
        f"--model.teacher.model={llama(tmp_path / 'teacher', 1)}",
        *[flag.format(name) for name in ("train", "val") for flag in prompts],
        "--data.reward=kdrl_lightning.ExactMatch",
        "--trainer.max_steps=4",
    ]
    main(["fit", *flags])
    summary = json.loads(Path("runs/rlad/version_0/summary.json").read_text())
    assert summary["optimizer_steps"] == 4
    exported = AutoModelForCausalLM.from_pretrained(summary["export_path"])
    assert exported.config.model_type == "llama"
