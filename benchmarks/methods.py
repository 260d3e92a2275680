"""All methods on the embedded task, with an equal search over learning rates for each.

For each setting (slip of the student's annotator) and each method: one run per learning rate on the
first seed, then all seeds with the best. Every run has the same number of rollouts. Writes
``methods.json``, ``methods.md`` (the table) and ``methods.png`` into --out.

    python benchmarks/methods.py --out docs/methods
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
METHODS = ("grpo", "on_policy_distillation", "kdrl", "kdrl_annealing", "rlad")
SETTINGS = {"easy": 0.9, "medium": 0.95, "hard": 0.98}
RATES = (1.5e-4, 3e-4, 6e-4)
ROLLOUTS, EVERY = 80, 5


def run(job: tuple[str, str, float, int]) -> dict[str, Any]:
    """One run; returns its curve, final accuracies and seconds."""
    method, setting, rate, seed = job
    import torch
    from lightning.pytorch.callbacks import Callback

    from kdrl_lightning.callbacks import RunReport
    from kdrl_lightning.cli import KDRLCLI
    from kdrl_lightning.rollout import Sampling

    torch.set_num_threads(1)
    config = ["--config", str(ROOT / "configs" / f"{method}.yaml")]
    updates = KDRLCLI.run(config, instantiate_only=True).datamodule.updates_per_rollout
    steps = ROLLOUTS * updates
    cli = KDRLCLI.run(
        [
            *config,
            f"--seed_everything={seed}",
            f"--model.student.slip={SETTINGS[setting]}",
            f"--model.optimizer.lr={rate}",
            f"--model.lr_scheduler.total_iters={steps}",
            f"--trainer.max_steps={steps}",
            f"--data.rollouts_per_epoch={EVERY}",
            "--trainer.enable_checkpointing=false",
            "--trainer.logger=false",
            f"--trainer.default_root_dir={tempfile.mkdtemp()}",
            "--report.export=false",
        ],
        instantiate_only=True,
    )
    sampled: list[float] = []

    class SampledAccuracy(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            data = trainer.datamodule
            greedy, data.val_sampling = data.val_sampling, Sampling(24, 1.0)
            sampled.append(data.evaluate(pl_module.weights()))
            data.val_sampling = greedy

    cli.trainer.callbacks.append(SampledAccuracy())
    started = time.perf_counter()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    report = next(c for c in cli.trainer.callbacks if isinstance(c, RunReport))
    watch = cli.datamodule.watch.seconds
    return {
        "method": method,
        "setting": setting,
        "lr": rate,
        "seed": seed,
        "updates": updates,
        "curve": [[step / updates, accuracy] for step, accuracy in report.accuracy],
        "greedy": report.accuracy[-1][1],
        "sampled": sampled[0],
        "teacher": report.teacher_accuracy,
        "seconds": time.perf_counter() - started,
        "work_seconds": sum(watch.values()) + report._train_seconds,
    }


def reached(curve: list[list[float]], level: float) -> float | None:
    """First measured rollout at which accuracy is at least ``level``."""
    return next((rollout for rollout, accuracy in curve if accuracy >= level), None)


def search(pool: Any, seeds: list[int], settings: list[str], results: list[dict[str, Any]]) -> None:
    """Run the equal search, then the remaining seeds with each method's best rate.

    Appends to ``results``; a run that is there already is not repeated.
    """

    def run_all(jobs: list[tuple[str, str, float, int]]) -> None:
        known = {(r["method"], r["setting"], r["lr"], r["seed"]) for r in results}
        jobs = [job for job in jobs if job not in known]
        for done, result in enumerate(pool.imap_unordered(run, jobs), 1):
            results.append(result)
            show(result, done, len(jobs))

    run_all([(m, s, r, seeds[0]) for s in settings for m in METHODS for r in RATES])
    best = {}
    for setting in {r["setting"] for r in results}:
        for method in METHODS:
            tried = [
                r
                for r in results
                if (r["method"], r["setting"], r["seed"]) == (method, setting, seeds[0])
            ]
            # The best end; of those within two points, the fastest (mean over the curve).
            end = max(r["greedy"] for r in tried)
            best[method, setting] = max(
                (r for r in tried if r["greedy"] >= end - 0.02),
                key=lambda r: statistics.mean(a for _, a in r["curve"]),
            )["lr"]
    run_all([(m, s, best[m, s], seed) for s in settings for m in METHODS for seed in seeds])
    for result in results:
        result["chosen"] = result["lr"] == best[result["method"], result["setting"]]


def show(result: dict[str, Any], done: int, total: int) -> None:
    """Print one finished run."""
    print(
        f"[{done}/{total}] {result['setting']} {result['method']} lr {result['lr']:g} "
        f"seed {result['seed']}: greedy {result['greedy']:.3f} sampled {result['sampled']:.3f} "
        f"in {result['seconds']:.0f} s",
        flush=True,
    )


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: mean (lowest - highest) over seeds, for each setting."""
    lines = []
    for setting, slip in SETTINGS.items():
        if not any(r["setting"] == setting for r in results):
            continue
        lines += [
            f"**{setting}** (slip {slip})",
            "",
            "| method | lr | updates per rollout | greedy | sampled | rollouts to 0.5 | to 0.8 "
            "| seconds |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for method in METHODS:
            runs = [
                r
                for r in results
                if (r["method"], r["setting"]) == (method, setting) and r["chosen"]
            ]
            if not runs:
                continue

            def spread(name: str, runs: list[dict[str, Any]] = runs) -> str:
                values = [r[name] for r in runs]
                return f"{statistics.mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"

            def first(level: float, runs: list[dict[str, Any]] = runs) -> str:
                found = [reached(r["curve"], level) for r in runs]
                known = [f for f in found if f is not None]
                if not known:
                    return "–"
                return f"{statistics.median(known):g}" + (
                    "" if len(known) == len(found) else f" ({len(known)} of {len(found)})"
                )

            lines.append(
                f"| {method} | {runs[0]['lr']:g} | {runs[0]['updates']} | {spread('greedy')} "
                f"| {spread('sampled')} | {first(0.5)} | {first(0.8)} "
                f"| {statistics.median(r['work_seconds'] for r in runs):.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Greedy accuracy over rollouts: mean over seeds, band from lowest to highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {s: slip for s, slip in SETTINGS.items() if any(r["setting"] == s for r in results)}
    figure = Figure(figsize=(1 + 4.5 * len(shown), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, (setting, slip) in zip(axes, shown.items(), strict=True):
        for i, method in enumerate(METHODS):
            runs = [
                r["curve"]
                for r in results
                if (r["method"], r["setting"]) == (method, setting) and r["chosen"]
            ]
            if not runs:
                continue
            rollouts = [x for x, _ in runs[0]]
            columns = list(zip(*[[a for _, a in run] for run in runs], strict=True))
            color = f"C{i}"
            axis.plot(rollouts, [statistics.mean(c) for c in columns], color=color, label=method)
            axis.fill_between(
                rollouts,
                [min(c) for c in columns],
                [max(c) for c in columns],
                color=color,
                alpha=0.15,
                linewidth=0,
            )
        axis.set_title(f"{setting}: slip {slip}")
        axis.set_xlabel("rollouts")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("greedy accuracy")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for table and plot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--settings",
        nargs="+",
        default=list(SETTINGS),
        choices=SETTINGS,
        help="run these; runs that --out already holds are kept",
    )
    parser.add_argument("--processes", type=int, default=max((os.cpu_count() or 2), 1))
    args = parser.parse_args()
    from kdrl_lightning.tiny import TinyModel

    for setting in args.settings:
        TinyModel("student", SETTINGS[setting]).path()
    TinyModel("teacher").path()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "methods.json"
    results = json.loads(file.read_text())["results"] if file.exists() else []
    with mp.get_context("spawn").Pool(args.processes, maxtasksperchild=8) as pool:
        search(pool, args.seeds, args.settings, results)
    import torch

    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {args.processes} runs at a time, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    record = {"machine": machine, "rollouts": ROLLOUTS, "rates": RATES, "results": results}
    file.write_text(json.dumps(record, indent=1) + "\n")
    text = table(results)
    (args.out / "methods.md").write_text(text)
    plot(results, args.out / "methods.png")
    print(text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
