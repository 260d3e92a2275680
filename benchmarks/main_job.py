"""Makes the README's picture: GRPO, KDRL and RLAD on the embedded task with a verifier that errs.

All three have the same student, prompts, sampling noise and verifier, so their first rollout is the
same; RLAD has more updates per rollout. Writes ``main_job.json`` and ``main_job.png`` into --out.

    python benchmarks/main_job.py --out docs
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
ROLLOUTS, RATE = 80, 3e-4
METHODS = {"RLAD": "rlad", "KDRL": "kdrl", "GRPO": "grpo"}


def run(method: str, seed: int) -> dict[str, Any]:
    """Train one method, and return its result."""
    from benchmarks.methods import train

    files = [f"configs/{METHODS[method]}.yaml", "configs/base/erring_verifier.yaml"]
    config = [f"--config={ROOT / file}" for file in files]
    return {"method": method, "seed": seed, **train(config, ROLLOUTS, RATE, seed)}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw true greedy accuracy over rollouts: mean and range over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, method in enumerate(METHODS):
        curves = [r["curve"] for r in results if r["method"] == method]
        if not curves:
            continue
        rollouts = [x for x, _ in curves[0]]
        columns = list(zip(*[[a for _, a in curve] for curve in curves], strict=True))
        label = f"{method} ({len(curves)} seed{'s' * (len(curves) > 1)})"
        axis.plot(rollouts, [statistics.mean(c) for c in columns], f"C{i}o-", label=label)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axis.fill_between(rollouts, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    axis.set_title("a verifier that accepts three of ten wrong answers")
    axis.set_xlabel("rollouts")
    axis.set_ylabel("true greedy accuracy, 512 held-out problems")
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for picture and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "main_job.json"
    results: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    known = {(r["method"], r["seed"]) for r in results}
    for seed in args.seeds:
        for method in METHODS:
            if (method, seed) not in known:
                results.append(run(method, seed))
                lines = ",\n".join(json.dumps(r) for r in results)
                file.write_text(f"[\n{lines}\n]\n")
                print(f"{method} seed {seed}: {results[-1]['greedy']:.3f}", flush=True)
    plot(results, args.out / "main_job.png")


if __name__ == "__main__":
    main()
