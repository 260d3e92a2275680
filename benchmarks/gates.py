"""Measures whether gates on imitation help: KDRL with a teacher that errs, gate by gate.

The teacher forgets half of the carries, the student nine of ten. Runs use each gate alone, and all
gates together. Writes ``gates.json`` and ``gates.md`` into --out.

    python benchmarks/gates.py --out docs/comparison
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ROLLOUTS, RATE = 30, 6e-4
# A gate also lowers the total weight of the KL, so a second control lowers only that.
BETA = {"none, β 0.1": 0.1}
GATES: dict[str, dict[str, float]] = {
    "none": {},
    "none, β 0.1": {},
    "alignment ≤ 1 nat": {"alignment_threshold": 1.0},
    "advantage ≥ 0": {"advantage_threshold": 0.0},
    "entropy ≤ 0.3 nats": {"exploration_entropy": 0.3},
    "all three": {
        "alignment_threshold": 1.0,
        "advantage_threshold": 0.0,
        "exploration_entropy": 0.3,
    },
}
TITLE = """# Gates on imitation: the figures

[The comparison](README.md#gates-on-imitation) explains them.

"""


def run(gate: str, seed: int) -> dict[str, Any]:
    """Train KDRL with one gate, and return its accuracies."""
    from benchmarks.methods import train

    config = [
        "--config",
        str(ROOT / "configs/kdrl.yaml"),
        "--model.teacher.init_args.model.init_args.role=student",
        "--model.teacher.init_args.model.init_args.slip=0.5",
    ]
    if gate in BETA:
        config.append(f"--model.objective.init_args.teacher_kl_coef={BETA[gate]}")
    if GATES[gate]:
        selection = [{"class_path": "Gates", "init_args": GATES[gate]}]
        config.append(f"--model.objective.init_args.selection={json.dumps(selection)}")
    return {"gate": gate, "seed": seed, **train(config, ROLLOUTS, RATE, seed)}


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table: mean (lowest - highest) over seeds."""
    lines = ["| gate | greedy | sampled |", "| --- | --- | --- |"]
    for gate in GATES:
        runs = [r for r in results if r["gate"] == gate]
        cells = [
            f"{statistics.mean(v):.2f} ({min(v):.2f}–{max(v):.2f})"
            for v in ([r[name] for r in runs] for name in ("greedy", "sampled"))
        ]
        lines.append(f"| {gate} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for table and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in args.seeds:
        for gate in GATES:
            results.append(run(gate, seed))
            last = results[-1]
            print(f"{gate} seed {seed}: {last['greedy']:.3f} {last['sampled']:.3f}", flush=True)
    (args.out / "gates.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (args.out / "gates.md").write_text(TITLE + text)
    print(text)


if __name__ == "__main__":
    main()
