"""Compares this library with TRL's trainers on the same work: time, memory, tokens per second.

    python benchmarks/vs_trl.py --out results [--cases embedded-grpo smollm2-grpo ...] [--runs 5]

Both sides get the same weights, precision, prompts, completion lengths, optimizer and number of
steps; layers are recomputed in the backward pass on both or on neither (the table says which). Each
run is a fresh process, the sides take turns, and a side's time and memory come from the same run.
``-given`` cases give both the same completions and so measure training alone; in all others each
side samples. Memory is the process's private memory above what it holds, trimmed, after its first
optimizer step: imports, weights, gradients and moments.

Each run is stored in ``--out`` when it ends, and is not repeated. A table and a picture are written
there, too. Needs ``pip install -e '.[peers,test]'``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peers.job import PARTS, Job

EMBEDDED = {"model": "embedded", "prompts": 32, "group": 8, "micro": 256, "tokens": 24, "steps": 9}
SMOLLM2 = {"model": "smollm2", "prompts": 2, "group": 8, "micro": 4, "tokens": 64, "steps": 2}
# 2,048 completion tokens in one micro-batch; layers recomputed, as is TRL's default.
LARGE = {"prompts": 1, "micro": 8, "tokens": 256, "steps": 1, "fixed": True, "checkpointing": True}
# 192 given tokens a completion; all of a step in one micro-batch.
HEAD = {"model": "head-heavy", "tokens": 192, "steps": 2, "fixed": True}
CASES: dict[str, dict[str, Any]] = {
    "embedded-grpo": EMBEDDED,
    "embedded-grpo-given": {**EMBEDDED, "fixed": True},
    "embedded-kdrl": {**EMBEDDED, "work": "kdrl"},
    "embedded-rlad": {**EMBEDDED, "work": "rlad"},
    "embedded-distillation": {**EMBEDDED, "work": "distillation", "prompts": 256, "group": 1},
    "smollm2-grpo": SMOLLM2,
    "smollm2-grpo-recomputed": {**SMOLLM2, "checkpointing": True},
    "smollm2-grpo-given": {**SMOLLM2, "fixed": True},
    "smollm2-grpo-memory": {**SMOLLM2, **LARGE},
    "smollm2-kdrl": {**SMOLLM2, "work": "kdrl"},
    "smollm2-rlad": {**SMOLLM2, "work": "rlad"},
    "smollm2-distillation": {**SMOLLM2, "work": "distillation", "prompts": 16, "group": 1},
    "smollm2-distillation-memory": {
        **SMOLLM2,
        **LARGE,
        "work": "distillation",
        "prompts": 8,
        "group": 1,
    },
    "head-grpo": {**HEAD, "prompts": 4, "group": 8, "micro": 32},
    "head-distillation": {**HEAD, "work": "distillation", "prompts": 16, "group": 1, "micro": 16},
}
# TRL does the same work for both: GRPO with its reference model.
SAME_FOR_TRL = {"embedded-rlad": "embedded-kdrl", "smollm2-rlad": "smollm2-kdrl"}
FIGURES = (*PARTS, "cpu", "above_mb", "peak_mb", "tokens_per_s", "generated_per_s")


def job_of(case: str, side: str, args: argparse.Namespace, run: int) -> Job:
    common = {"work": "grpo", "fixed": False, "checkpointing": False, "precision": args.precision}
    return Job(side=side, threads=args.threads, seed=run, **{**common, **CASES[case]})


def in_fresh_process(job: Job) -> dict[str, Any]:
    out = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(asdict(job))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"},
    )
    found = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
    if not found:
        raise RuntimeError(out.stderr[-3000:])
    return dict(json.loads(found[-1].removeprefix("RESULT ")))


def child(text: str) -> None:
    job = Job(**json.loads(text))
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    if job.side == "ours":
        from peers.ours import run
    else:
        from peers.theirs import run
    print("RESULT " + json.dumps(run(job)))


TITLE = "# Compared with TRL: all figures"
INTRODUCTION = (
    "[The page on time and memory](../speed.md) describes the cases. Columns *ours* and *TRL* are "
    "medians over runs; the last two are median and range of the ratio of paired runs. "
    "*generation*, *scoring*, *training* and *step* are seconds of a step, *above_mb* is memory "
    "above weights, gradients and moments, and *peak_mb* the peak. *tokens_per_s* counts the "
    "whole step, *generated_per_s* sampling alone."
)


def table(cases: list[str], record: dict[str, Any]) -> list[str]:
    """Return a table: medians of both sides, and median and range of the ratio of paired runs."""
    lines = [
        "| case | part | ours | TRL | ours / TRL | range |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        pairs = [p for p in record["runs"].get(case, []) if len(p) == 2]
        for figure in FIGURES:
            both = [(p["ours"].get(figure, 0.0), p["trl"].get(figure, 0.0)) for p in pairs]
            if not both or not any(ours or theirs for ours, theirs in both):
                continue
            ours, theirs = (statistics.median(x) for x in zip(*both, strict=True))
            ratios = [a / b for a, b in both if b]
            ratio = f"{statistics.median(ratios):.2f}" if ratios else "-"
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-"
            lines.append(f"| {case} | {figure} | {ours:.3g} | {theirs:.3g} | {ratio} | {spread} |")
    return lines


def shares(record: dict[str, Any]) -> list[str]:
    """Return a table of what a teacher of the student's size adds to our GRPO step.

    Times are per sampled token, because the objectives sample other lengths after an update.
    """
    lines = ["| what a teacher adds | median | range |", "| --- | --- | --- |"]
    for model in ("embedded", "smollm2"):
        base = record["runs"].get(f"{model}-grpo", [])
        for work in ("kdrl", "rlad"):
            pairs = zip(base, record["runs"].get(f"{model}-{work}", []), strict=False)
            rates = [
                (a["ours"]["tokens_per_s"], b["ours"]["tokens_per_s"]) for a, b in pairs if a and b
            ]
            if rates:
                more = [plain / with_teacher - 1 for plain, with_teacher in rates]
                spread = f"{min(more):+.0%} to {max(more):+.0%}"
                lines.append(f"| {model}-{work} | {statistics.median(more):+.0%} | {spread} |")
    return lines if len(lines) > 2 else []


def plot(cases: list[str], record: dict[str, Any], file: Path) -> None:
    """Draw where a step's time goes on both sides, in medians as a share of TRL's step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = ("generation", "scoring", "training", "rest")
    colors = dict(zip(names, ("tab:blue", "tab:green", "tab:orange", "tab:gray"), strict=True))
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.62 * len(cases)), layout="constrained")
    for row, case in enumerate(cases):
        pairs = [p for p in record["runs"][case] if len(p) == 2]
        whole = statistics.median(p["trl"]["step"] for p in pairs)
        for offset, side, label in ((-0.2, "ours", "ours"), (0.2, "trl", "TRL")):
            middle = {n: statistics.median(p[side][n] for p in pairs) / whole for n in PARTS}
            middle["rest"] = max(middle["step"] - sum(middle[n] for n in names[:3]), 0.0)
            left = 0.0
            for name in names:
                axis.barh(row + offset, middle[name], 0.36, left, color=colors[name])
                left += middle[name]
            axis.text(left + 0.01, row + offset, f"{label} {left:.2f}", va="center", fontsize=8)
    axis.set_yticks(range(len(cases)), cases)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12)
    axis.set_xlabel("time of a step, TRL's = 1")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"vs_trl-{args.precision}.json"
    machine = f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    record = json.loads(file.read_text()) if file.exists() else {"machine": machine, "runs": {}}
    for run in range(args.runs):
        for case in args.cases:
            pairs = record["runs"].setdefault(case, [])
            if run == len(pairs):
                pairs.append({})
            for side in ("ours", "trl") if run % 2 == 0 else ("trl", "ours"):
                done = record["runs"].get(SAME_FOR_TRL.get(case, ""), [])
                if side == "trl" and len(done) > run and side in done[run]:
                    pairs[run].setdefault(side, done[run][side])
                if side not in pairs[run]:
                    pairs[run][side] = in_fresh_process(job_of(case, side, args, run))
                    file.write_text(json.dumps(record, indent=1) + "\n")
                    print(case, run, side, pairs[run][side], flush=True)
    head = [TITLE, "", f"{record['machine']}; precision {args.precision}. {INTRODUCTION}", ""]
    lines = [*head, *table(args.cases, record), ""]
    lines += [*shares(record), ""]
    file.with_suffix(".md").write_text("\n".join(lines))
    plot(args.cases, record, file.with_suffix(".png"))
    print("\n".join(lines))


if __name__ == "__main__":
    child(sys.argv[2]) if sys.argv[1:2] == ["--child"] else main()
