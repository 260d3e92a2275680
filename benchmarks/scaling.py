"""Measures how a step's cost grows with length, group size, vocabulary and micro-batches.

    python benchmarks/scaling.py --out docs/scaling [--threads 1]

GRPO trains a small random Qwen2 on given completions, each point in a new process. It measures
seconds of a whole step, and the peak of private memory above weights, gradients and moments, as in
``vs_trl.py``. Writes ``scaling.json``, ``scaling.md`` and ``scaling.png``: a panel per
quantity with the exponents of least squares in the logarithms, and the law of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.job import Job
from qwen2 import save_qwen2

WIDTH = 128
BASE = {"prompts": 1, "group": 4, "tokens": 512, "vocab": 32_000, "parts": 1, "tied": False}
SERIES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "completion length": (
        "tokens",
        [{"tokens": t, "group": 2} for t in (128, 256, 512, 1024, 2048, 4096)],
    ),
    "group size": ("group", [{"tokens": 128, "group": g} for g in (4, 8, 16, 32)]),
    "vocabulary": ("vocab", [{"vocab": v} for v in (8_000, 32_000, 64_000, 152_000)]),
    "vocabulary, tied": (
        "vocab",
        [{"vocab": v, "tied": True} for v in (8_000, 32_000, 64_000, 152_000)],
    ),
    # The second micro-batch adds its gradient of the head to the first's.
    "vocabulary, two micro-batches": (
        "vocab",
        [{"vocab": v, "parts": 2} for v in (32_000, 152_000)],
    ),
    "micro-batches": ("parts", [{"prompts": 4, "parts": p} for p in (1, 2, 4, 8)]),
}


def make_model(folder: Path, vocab: int, tied: bool) -> None:
    """Write a random Qwen2 of two layers, whose head is as wide as they are."""
    from kdrl_lightning.tiny import TinyModel

    save_qwen2(
        folder,
        TinyModel("student").path(),
        vocab,
        WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )


def measure(point: dict[str, Any], threads: int, steps: int) -> dict[str, float]:
    """Run one point in a new process, and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), point["vocab"], point["tied"])
        rows = point["prompts"] * point["group"]
        job = Job(
            side="ours",
            model=folder,
            work="grpo",
            prompts=point["prompts"],
            group=point["group"],
            micro=rows // point["parts"],
            tokens=point["tokens"],
            steps=steps,
            fixed=True,
            checkpointing=False,
            precision="32",
            threads=threads,
            seed=0,
        )
        script = Path(__file__).with_name("vs_trl.py")
        # Return freed memory at once: otherwise a process would keep it.
        own = {"OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "65536"}
        out = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), "--child", json.dumps(asdict(job))],
            capture_output=True,
            text=True,
            env={**os.environ, **own, "HF_HUB_OFFLINE": "1"},
        )
    found = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
    if not found:
        raise RuntimeError(out.stderr[-3000:])
    result = json.loads(found[-1].removeprefix("RESULT "))
    return {"seconds": result["step"], "mb": result["above_mb"]}


TITLE = "# How the cost of a step grows: figures"
INTRODUCTION = (
    "[The page on time and memory](../speed.md#how-cost-grows) describes the runs. *MB above the "
    "state* is memory above weights, gradients and moments; *exponent* is the power of the value "
    "with which a column grows."
)


def exponent(x: list[float], y: list[float]) -> float:
    """Return the slope of ``log y`` over ``log x``, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def of(record: dict[str, Any], name: str, figure: str) -> tuple[list[float], list[float]]:
    key = SERIES[name][0]
    rows = record["points"][name]
    return [float(r[key]) for r in rows], [float(r[figure]) for r in rows]


def law(record: dict[str, Any]) -> list[str]:
    """Return lines with the law that the measured memory follows."""
    tokens, mb = of(record, "completion length", "mb")
    rows = [2 * t for t in tokens]
    # From 1,024 rows on, a chunk's buffers have their full size.
    whole = [(t, m) for t, m in zip(rows, mb, strict=True) if t >= 1024]
    rows, mb = [t for t, _ in whole], [m for _, m in whole]
    slope, fixed = np.polyfit(rows, mb, 1)
    worst = max(abs(slope * t + fixed - m) / m for t, m in zip(rows, mb, strict=True))
    lines = [
        f"Memory by tokens of the micro-batch: {fixed:.0f} MB + {1000 * slope:.1f} MB per thousand "
        f"tokens (at most {worst:.0%} off); the part above {fixed:.0f} MB grows with the power "
        f"{exponent(rows, [m - fixed for m in mb]):.2f}."
    ]
    for name in (n for n in SERIES if n.startswith("vocabulary")):
        vocab, mb = of(record, name, "mb")
        at = dict(zip(vocab, mb, strict=True))
        head = {v: v * WIDTH * 4 / 2**20 for v in vocab}
        for heads in (0, 1, 2):
            small, large = (at[v] - heads * head[v] for v in (32_000.0, 152_000.0))
            lines.append(
                f"{name}, minus {heads} temporaries of the head's size: {small:.0f} MB at "
                f"V = 32,000 and {large:.0f} MB at 152,000 ({large / small - 1:+.0%})."
            )
    return lines


def table(record: dict[str, Any]) -> list[str]:
    lines = [
        "| against | value | seconds a step | MB above the state |",
        "| --- | --- | --- | --- |",
    ]
    for name, (key, _) in SERIES.items():
        for row in record["points"][name]:
            lines.append(f"| {name} | {row[key]} | {row['seconds']:.2f} | {row['mb']:.0f} |")
        exponents = [exponent(*of(record, name, figure)) for figure in ("seconds", "mb")]
        lines.append(f"| {name} | *exponent* | {exponents[0]:.2f} | {exponents[1]:.2f} |")
    return lines


def plot(record: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    names = [n for n in SERIES if not n.startswith("vocabulary,")]
    for panel, name in zip(panels.flat, names, strict=True):
        right = panel.twinx()
        for axis, what, color in ((panel, "seconds", "tab:blue"), (right, "mb", "tab:red")):
            x, y = of(record, name, what)
            label = f"{'seconds' if what == 'seconds' else 'MB'}, exponent {exponent(x, y):.2f}"
            axis.loglog(x, y, "o-" if what == "seconds" else "s--", color=color, label=label)
            axis.set_ylim(min(y) / 3, max(y) * 3)
            axis.tick_params(axis="y", labelcolor=color)
        panel.set_xticks(x, [f"{v:g}" if v < 8000 else f"{v / 1000:g}k" for v in x])
        panel.minorticks_off()
        panel.set_xlabel(name)
        panel.set_ylabel("seconds a step", color="tab:blue")
        right.set_ylabel("MB above the state", color="tab:red")
        lines = [*panel.get_lines(), *right.get_lines()]
        panel.legend(lines, [str(v.get_label()) for v in lines], loc="upper left", fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    record: dict[str, Any] = {"machine": machine, "width": WIDTH, "base": BASE, "points": {}}
    for name, (_, points) in SERIES.items():
        record["points"][name] = []
        for change in points:
            point = {**BASE, **change}
            record["points"][name].append(point | measure(point, args.threads, args.steps))
            print(name, record["points"][name][-1], flush=True)
    (args.out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    head = [TITLE, "", f"{record['machine']}. {INTRODUCTION}"]
    text = [*head, "", *table(record), "", *(f"- {x}" for x in law(record)), ""]
    (args.out / "scaling.md").write_text("\n".join(text))
    plot(record, args.out / "scaling.png")
    print("\n".join(text))


if __name__ == "__main__":
    main()
