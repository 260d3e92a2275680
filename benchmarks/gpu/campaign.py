"""A short RLAD run with vLLM on a random model of Qwen3-0.6B's shape, and one table of everything.

    bash benchmarks/gpu/run.sh [FOLDER]

``run.sh`` first writes doctor's findings, which hold the benchmarks of the head and of updates.
Without vLLM the run samples with transformers.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kdrl_lightning.hardware.doctor.bench import Bench

# prime-rl's trainer alone: Qwen3-0.6B, 16k tokens a row, full recompute, one H100.
PRIME_RL = 11_900
LIMIT, LIMIT_CPU = 240, 1800  # seconds


def main(folder: Path) -> None:
    """Run, and write ``campaign.json`` and ``campaign.md``."""
    doctor = json.loads((folder / "doctor.json").read_text())
    report = {"machine": doctor["machine"], "run": rlad(), "checks": doctor["checks"]}
    (folder / "campaign.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "campaign.md").write_text(table(report))
    print(table(report))
    if report["run"]["code"]:
        raise SystemExit(1)


def rlad() -> dict[str, Any]:
    """Train on a random model for a few rollouts; return speeds, medians after the first."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), torch.device("cuda", 0) if gpus else torch.device("cpu"), gpus)
        tokens, prompts, rollouts = (512, 32, 4) if gpus else (12, 4, 3)
        model = bench.path("model")
        command = [
            *(sys.executable, "-m", "kdrl_lightning", "fit", "--config=rlad"),
            f"--model.student={model}",
            f"--model.teacher.model={model}",
            "--data.reward=even_length.even_length",
            f"--data.rollout.max_tokens={tokens}",
            f"--data.rollout.prompts_per_rollout={prompts}",
            "--data.rollout.rollouts_per_epoch=100",
            "--data.train_prompts.size=256",
            "--data.val_prompts.size=8",
            f"--trainer.max_steps={4 * rollouts}",
            "--trainer.num_sanity_val_steps=0",
            f"--trainer.accelerator={'gpu' if gpus else 'cpu'}",
            "--trainer.devices=1",
            f"--trainer.default_root_dir={name}/runs",
        ]
        if gpus:
            command += ["--config=hardware/gpu1", "--trainer.accumulate_grad_batches=4"]
        if importlib.util.find_spec("vllm") is not None:
            command.append("--config=engine/vllm")
        began, limit = time.perf_counter(), LIMIT if gpus else LIMIT_CPU
        try:
            made = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"code": 124, "error": f"it took longer than {limit} s", "metrics": {}}
        seconds = time.perf_counter() - began
        if made.returncode:
            return {"code": made.returncode, "error": made.stderr[-2000:], "metrics": {}}
        (file,) = Path(name).rglob("metrics.csv")
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
    return {
        "code": 0,
        "engine": "vLLM" if command[-1] == "--config=engine/vllm" else "transformers",
        "seconds": round(seconds, 1),
        "completions": f"{prompts} x 8 of {tokens} tokens",
        "metrics": medians(rows),
    }


def medians(rows: list[dict[str, str]]) -> dict[str, float]:
    """Return each speed's median over the rollouts after the first."""
    out = {}
    for name in rows[0]:
        if name.startswith("time/") or name in ("tokens_per_s", "memory/peak_gb"):
            values = [float(row[name]) for row in rows if row[name]]
            # A value stands in all rows of its rollout: four updates each.
            out[name] = statistics.median(values[4:] or values)
    return out


def table(report: dict[str, Any]) -> str:
    """Return everything as Markdown."""
    out = ["# One machine, checked and measured", ""]
    out += [f"- {name}: {value}" for name, value in report["machine"].items()]
    run = report["run"]
    out += ["", f"## RLAD on a random model: {run.get('completions', 'failed')}", ""]
    if run["code"]:
        out += [f"It ended with code {run['code']}: {run['error']}"]
    else:
        out += ["| figure | median |", "| --- | --- |"]
        out += [f"| {name} | {value:.4g} |" for name, value in sorted(run["metrics"].items())]
        out += [f"| sampled by | {run['engine']} |"]
    out += ["", f"prime-rl publishes {PRIME_RL:,} tokens a second for its trainer alone."]
    for check in report["checks"]:
        out += ["", f"## {check['name']}: {check['verdict']} ({check['seconds']} s)", ""]
        out += [check["reason"], ""] if check["reason"] else []
        out += ["| what | value | bound | |", "| --- | --- | --- | --- |"]
        marks = {True: "ok", False: "**failed**", None: ""}
        out += [
            f"| {f['what']} | {f['value']} | {f['bound']} | {marks[f['passed']]} |"
            for f in check["findings"]
        ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
