"""Compares all methods on the embedded task and on Knights and Knaves.

The search for the learning rate is equal for all methods: for each setting and method, one run per
learning rate on the first seed, then all seeds with the best; other settings are those of the
configurations. Every run of a setting has the same number of rollouts and completions to learn
from, and the same prompts, but DAPO samples more prompts to replace groups without variance. Writes
``methods.json``, ``methods.md`` (the tables) and ``methods.png`` into --out.

    python benchmarks/methods.py --out docs/comparison
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
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FAMILY = (
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "on_policy_distillation",
    "kdrl",
    "kdrl_annealing",
    "kdrl_mask_response",
    "kdrl_mask_group",
    "hdpo",
    "srpo",
    "rlsd",
    "rlad",
    "opd_then_rl",
    "luffy",
    "gkd",
    "gkd_top_k",
    "sft",
    "rejection_sft",
)


# On the student that can read a worked solution, which some of them show to their teacher.
PRIVILEGED = (
    "grpo",
    "kdrl",
    "own_prompt",
    "opsd",
    "sdpo",
    "sdpo_feedback",
    "srpo_published",
    "hdpo_published",
    "self_teachers/sdft",
    "self_teachers/rlsd",
    "self_teachers/sdar",
    "self_teachers/g_opd",
    "self_teachers/eopd",
    "self_teachers/scope",
    "sdft",
    "rlsd_published",
    "sdar",
    "g_opd",
    "eopd",
    "scope",
)


class Setting(NamedTuple):
    """A task at one difficulty: the folder of its configurations, and the length of runs."""

    title: str
    configs: str
    methods: tuple[str, ...]
    rollouts: int
    rates: tuple[float, ...]
    overrides: tuple[str, ...] = ()


# configs/rlad.yaml has a verifier that errs in training.
EXACT = (
    "--data.train_prompts.class_path=kdrl_lightning.tiny.ColumnAddition",
    "--data.train_prompts.init_args.size=4096",
    "--data.train_prompts.init_args.seed=1",
    "--data.reward=kdrl_lightning.tiny.addition_reward",
)
SETTINGS = {
    "easy": Setting(
        "addition, slip 0.9",
        "configs",
        FAMILY,
        30,
        (3e-4, 6e-4),
        (*EXACT, "--model.student.slip=0.9"),
    ),
    "hard": Setting(
        "addition, slip 0.98",
        "configs",
        FAMILY,
        60,
        (3e-4, 6e-4, 1.2e-3),
        (*EXACT, "--model.student.slip=0.98"),
    ),
    "reader": Setting(
        "reading student",
        "configs",
        PRIVILEGED,
        30,
        (3e-4, 6e-4),
        (
            '--model.student={"class_path": "kdrl_lightning.tiny.TinyModel", '
            '"init_args": {"role": "reader"}}',
        ),
    ),
    "knights": Setting(
        "Knights and Knaves",
        "benchmarks/knights",
        ("grpo", "on_policy_distillation", "kdrl", "rlad"),
        60,
        (1.5e-4, 3e-4, 6e-4),
    ),
}
EVERY = 10


def run(job: tuple[str, str, float, int]) -> dict[str, Any]:
    """Run one method of the comparison, and return its result."""
    method, setting, rate, seed = job
    task = SETTINGS[setting]
    config = ["--config", str(ROOT / task.configs / f"{method}.yaml"), *task.overrides]
    job_of = {"method": method, "setting": setting, "lr": rate, "seed": seed}
    return {**job_of, "rollouts": task.rollouts, **train(config, task.rollouts, rate, seed)}


def built(
    config: list[str], rollouts: int, rate: float, seed: int, updates: int, every: int = EVERY
) -> Any:
    """Return trainer, model and data of a run whose rate falls to 0; it exports no student."""
    from kdrl_lightning.cli.main import KDRLCLI

    steps = rollouts * updates
    return KDRLCLI.run(
        [
            *config,
            f"--seed_everything={seed}",
            f"--model.optimizer.lr={rate}",
            f"--model.lr_scheduler.total_iters={steps}",
            f"--trainer.max_steps={steps}",
            f"--data.rollout.rollouts_per_epoch={every}",
            "--trainer.enable_checkpointing=false",
            "--trainer.logger=false",
            f"--trainer.default_root_dir={tempfile.mkdtemp()}",
            "--report.export=false",
            "--report.evaluate_teacher=false",
        ],
        instantiate_only=True,
    )


def train(config: list[str], rollouts: int, rate: float, seed: int) -> dict[str, Any]:
    """Train and return curve, final accuracies, lengths and seconds."""
    import torch
    from lightning.pytorch.callbacks import Callback

    from kdrl_lightning.callbacks import RunReport
    from kdrl_lightning.cli.main import KDRLCLI

    torch.set_num_threads(1)
    updates = KDRLCLI.run(config, instantiate_only=True).datamodule.updates_per_rollout
    cli = built(config, rollouts, rate, seed, updates)
    after: dict[str, float] = {}

    class Afterwards(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            data = trainer.datamodule
            after["length"] = float(trainer.callback_metrics["val/length_mean"])
            after["sampled"] = data.evaluate(pl_module.weights(), temperature=1.0)

    cli.trainer.callbacks.append(Afterwards())
    started = time.perf_counter()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    report = next(c for c in cli.trainer.callbacks if isinstance(c, RunReport))
    seconds = cli.datamodule.watch.seconds
    phases = ("time/sync_s", "time/rollout_s", "time/score_s")
    return {
        "updates": updates,
        "curve": [[step / updates, accuracy] for step, accuracy in report.accuracy],
        "greedy": report.accuracy[-1][1],
        **after,
        "seconds": time.perf_counter() - started,
        "work_seconds": sum(seconds[name] for name in phases) + report._train_seconds,
        "teacher_seconds": cli.datamodule.teacher_seconds,
        "completions": cli.datamodule.watch.completions,
    }


def reached(curve: list[list[float]], level: float) -> float | None:
    """Return the first measured rollout with an accuracy of at least ``level``."""
    return next((rollout for rollout, accuracy in curve if accuracy >= level), None)


def search(
    pool: Any,
    seeds: list[int],
    settings: list[str],
    results: list[dict[str, Any]],
    file: Path,
    rates: dict[tuple[str, str], float],
) -> None:
    """Run the equal search, then the remaining seeds with each method's best rate.

    It appends to ``results`` and writes them to ``file``; it does not repeat runs in ``results``.
    Methods in ``rates``, by setting and name, take that rate without a search.
    """

    def run_all(jobs: list[tuple[str, str, float, int]]) -> None:
        known = {(r["method"], r["setting"], r["lr"], r["seed"], r["rollouts"]) for r in results}
        jobs = [job for job in jobs if (*job, SETTINGS[job[1]].rollouts) not in known]
        for done, result in enumerate(pool.imap_unordered(run, jobs), 1):
            results.append(result)
            file.write_text(json.dumps({"results": results}) + "\n")
            show(result, done, len(jobs))

    run_all(
        [
            (m, s, r, seeds[0])
            for s in settings
            for m in SETTINGS[s].methods
            for r in SETTINGS[s].rates
            if (s, m) not in rates
        ]
    )
    best = dict(rates)
    for setting in settings:
        for method in SETTINGS[setting].methods:
            if (setting, method) in rates:
                continue
            tried = [
                r
                for r in results
                if (r["method"], r["setting"], r["seed"]) == (method, setting, seeds[0])
                and r["rollouts"] == SETTINGS[setting].rollouts
            ]
            # The best final accuracy; within two points of it, the fastest (mean over the curve).
            end = max(r["greedy"] for r in tried)
            best[setting, method] = max(
                (r for r in tried if r["greedy"] >= end - 0.02),
                key=lambda r: statistics.mean(a for _, a in r["curve"]),
            )["lr"]
    run_all(
        [(m, s, best[s, m], seed) for s in settings for m in SETTINGS[s].methods for seed in seeds]
    )
    for result in results:
        if result["setting"] in settings:
            result["chosen"] = result["lr"] == best[result["setting"], result["method"]]


def show(result: dict[str, Any], done: int, total: int) -> None:
    """Print one finished run."""
    print(
        f"[{done}/{total}] {result['setting']} {result['method']} lr {result['lr']:g} "
        f"seed {result['seed']}: greedy {result['greedy']:.3f} sampled {result['sampled']:.3f} "
        f"in {result['seconds']:.0f} s",
        flush=True,
    )


def chosen(results: list[dict[str, Any]], setting: str, method: str) -> list[dict[str, Any]]:
    """Return the runs of a method with its best rate."""
    return [r for r in results if (r["setting"], r["method"]) == (setting, method) and r["chosen"]]


TITLE = """# All methods compared: the tables

[The comparison](README.md) explains the columns and the results.

"""


def table(results: list[dict[str, Any]]) -> str:
    """Return Markdown tables for each setting: mean (lowest - highest) over seeds."""
    lines = []
    for setting, task in SETTINGS.items():
        if not any(r["setting"] == setting for r in results):
            continue
        lines += [
            f"**{setting}**: {task.title}, {task.rollouts} rollouts",
            "",
            "| method | lr | updates | completions | greedy | sampled | tokens | rollouts to 0.5 "
            "| s per rollout | teacher |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for method in task.methods:
            runs = chosen(results, setting, method)
            if not runs:
                continue

            def spread(name: str, runs: list[dict[str, Any]] = runs) -> str:
                values = [r[name] for r in runs]
                return f"{statistics.mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"

            found = [reached(r["curve"], 0.5) for r in runs]
            known = [f for f in found if f is not None]
            first = "–" if not known else f"{statistics.median(known):g}"
            first += "" if len(known) in (0, len(found)) else f" ({len(known)} of {len(found)})"
            # The fastest of all its runs: other load on the machine can only slow a run.
            every = [r for r in results if (r["setting"], r["method"]) == (setting, method)]
            quickest = min(every, key=lambda r: float(r["work_seconds"]))
            rollout = quickest["work_seconds"] / task.rollouts
            made = [r["completions"] / task.rollouts for r in runs]
            share = quickest["teacher_seconds"] / quickest["work_seconds"]
            lines.append(
                f"| {method} | {runs[0]['lr']:g} | {runs[0]['updates']} "
                f"| {statistics.mean(made):.0f} | {spread('greedy')} "
                f"| {spread('sampled')} | {statistics.mean(r['length'] for r in runs):.1f} "
                f"| {first} | {rollout:.2f} | {share:.0%} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw greedy accuracy over rollouts, averaged over seeds, with a few methods per panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [s for s in SETTINGS if any(r["setting"] == s for r in results)]
    families = {
        "rewards": ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "luffy"),
        "teacher": ("on_policy_distillation", "gkd", "gkd_top_k", "sft", "rejection_sft"),
        "both, in the loss": (
            "kdrl",
            "kdrl_annealing",
            "kdrl_mask_response",
            "kdrl_mask_group",
            "opd_then_rl",
        ),
        "both, in ratio or advantage": ("rlad", "hdpo", "srpo", "rlsd"),
    }
    on_the_reader = {
        "baselines, teacher alone": ("grpo", "kdrl", "own_prompt", "opsd", "sdpo", "sdpo_feedback"),
        "as published": ("grpo", "srpo_published", "hdpo_published", "rlsd_published"),
        "self-teacher": tuple(name for name in PRIVILEGED if "/" in name),
        "external teacher": ("sdft", "rlsd_published", "sdar", "g_opd", "eopd", "scope"),
    }
    figure = Figure(figsize=(15, 3.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(families), sharey=True, squeeze=False)
    for axes, setting in zip(grid, rows, strict=True):
        panels = on_the_reader if setting == "reader" else families
        for axis, (family, methods) in zip(axes, panels.items(), strict=True):
            for i, method in enumerate(m for m in methods if m in SETTINGS[setting].methods):
                curves = [r["curve"] for r in chosen(results, setting, method)]
                if not curves:
                    continue
                rollouts = [x for x, _ in curves[0]]
                columns = list(zip(*[[a for _, a in curve] for curve in curves], strict=True))
                axis.plot(rollouts, [statistics.mean(c) for c in columns], f"C{i}", label=method)
                low, high = [min(c) for c in columns], [max(c) for c in columns]
                axis.fill_between(rollouts, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
            axis.set_title(f"{SETTINGS[setting].title}: {family}", fontsize="medium")
            axis.set_ylim(0, 1.02)
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="small")
        axes[0].set_ylabel("greedy accuracy")
    for axis in grid[-1]:
        axis.set_xlabel("rollouts")
    figure.savefig(path, dpi=100)


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
    parser.add_argument(
        "--rates-from", type=Path, help="methods.json of an earlier search: take its rates"
    )
    parser.add_argument("--processes", type=int, default=max((os.cpu_count() or 2), 1))
    args = parser.parse_args()
    from kdrl_lightning.cli.main import KDRLCLI
    from kdrl_lightning.models.loading import model_path

    for setting in args.settings:  # make the models once, before processes ask for them
        task = SETTINGS[setting]
        first = "kdrl" if setting == "reader" else "rlad"
        config = ["--config", str(ROOT / task.configs / f"{first}.yaml"), *task.overrides]
        module = KDRLCLI.run(config, instantiate_only=True).model
        model_path(module.student_source)
        module.teacher.prepare()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "methods.json"
    results: list[dict[str, Any]] = json.loads(file.read_text())["results"] if file.exists() else []
    earlier = json.loads(args.rates_from.read_text())["results"] if args.rates_from else []
    rates = {(r["setting"], r["method"]): r["lr"] for r in earlier if r.get("chosen")}
    with mp.get_context("spawn").Pool(args.processes, maxtasksperchild=8) as pool:
        search(pool, args.seeds, args.settings, results, file, rates)
    import torch

    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {args.processes} runs at a time, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    record = {"machine": machine, "results": results}
    file.write_text(json.dumps(record, indent=1) + "\n")
    text = table(results)
    (args.out / "methods.md").write_text(TITLE + text)
    plot(results, args.out / "methods.png")
    print(text)


if __name__ == "__main__":
    main()
