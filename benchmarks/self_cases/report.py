"""Tables and picture of the self-teachers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.self_cases.arms import ARMS, LEAKS, TASKS

# `Any`: results as JSON holds them, matplotlib's axes.
START, END = "<!-- tables: start -->", "<!-- tables: end -->"
PAGE = Path(__file__).parent / "page.txt"  # text above the tables: how it was measured
Result = Mapping[str, Any]
Rates = Mapping[str, Mapping[str, float]]


def chosen(results: Sequence[Result], task: str, arm: str, rate: float) -> list[Result]:
    """Return the runs of a method with one rate, by seed."""
    found = [r for r in results if (r["task"], r["arm"], r["lr"]) == (task, arm, rate)]
    return sorted(found, key=lambda r: int(r["seed"]))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return ``mean (lowest–highest)``."""
    mean, low, high = statistics.fmean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def compared(results: Sequence[Result], task: str, rates: Mapping[str, float]) -> str:
    """Return the table of a task."""
    head = ("method", "lr", "greedy", "mean over the run", "rollouts", "student passes")
    rows = [[*head, "teacher passes", "CPU s per step", "seeds"]]
    for arm in ARMS:
        runs = chosen(results, task, arm, rates[arm])
        if not runs:
            continue
        over = [statistics.fmean(value for _, value in r["curve"]) for r in runs]
        passes = [statistics.fmean(r[f"{who}_passes"] for r in runs) for who in WHO]
        # The fastest run: other load on the machine can only slow one down.
        seconds = min(r["cpu_seconds"] / r["steps"] for r in runs)
        rows.append(
            [
                *(arm, f"{rates[arm]:g}", spread([r["greedy"] for r in runs]), spread(over)),
                f"{statistics.fmean(r['rollouts'] for r in runs):.0f}",
                *(f"{number:,.0f}" for number in passes),
                *(f"{seconds:.3f}", str(len(runs))),
            ]
        )
    return markdown(rows)


WHO = ("student", "teacher")


def costs(results: Sequence[Result]) -> str:
    """Return what the first rollout of each method costs."""
    head = ("method", "optimizer steps", "student passes", "teacher passes", "completions sampled")
    rows = [[*head, "GFLOP", "GFLOP per step"]]
    for arm in ARMS:
        for r in (r for r in results if r["arm"] == arm and not r["lr"]):
            counts = (r["steps"], r["student_passes"], r["teacher_passes"], r["sampled"])
            flops = r["flops"] / 1e9
            numbers = [*map(str, counts), f"{flops:.1f}", f"{flops / r['steps']:.1f}"]
            rows.append([arm, *numbers])
    return markdown(rows)


def leakage(results: Sequence[Result]) -> str:
    """Return how often the student cites a solution that it does not see, and who noticed."""
    rows = [["method", "greedy", "citing completions at the end", "leakage warning", "at rollout"]]
    for arm in LEAKS:
        runs = [r for r in results if r["arm"] == arm and r["task"] == "citing"]
        if not runs:
            continue
        found = [step for r in runs for step, name in r["warnings"] if name == "leakage"]
        ends = [statistics.fmean(r["leak_frac"][-5:]) for r in runs]
        when = "–" if not found else f"{min(found)}–{max(found)}"
        greedy = spread([r["greedy"] for r in runs])
        rows.append([arm, greedy, spread(ends), f"{len(found)} of {len(runs)} runs", when])
    return markdown(rows)


def tables(results: Sequence[Result], rates: Rates) -> str:
    """Return all tables that have runs."""
    parts = []
    for task, best in rates.items():
        if any(r["task"] == task and r["lr"] for r in results):
            parts += [f"### {TASKS[task].title}", compared(results, task, best)]
    if any(not r["lr"] for r in results):
        parts += ["### Cost of one rollout (addition)", costs(results)]
    if any(r["task"] == "citing" for r in results):
        parts += ["### Leakage on purpose", leakage(results)]
    return "\n\n".join(parts)


PANELS = {
    "no teacher, external": ("GRPO", "KDRL, external", "RLAD, external"),
    "self-teacher with the reward": ("GRPO", "KDRL, self", "RLAD, self", "RLSD", "HDPO"),
    "self-teacher alone": (
        *("GRPO", "OPSD", "SDPO", "SDFT"),
        "on-policy distillation, self",
    ),
    "controls": (
        *("GRPO", "KDRL, self", "KDRL, self, other problem"),
        *("on-policy distillation, external", "SDPO, sibling"),
    ),
}


def plot(results: Sequence[Result], rates: Rates, path: Path) -> None:
    """Draw accuracy over student passes, a row per task, and the leakage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [t for t in rates if any(r["task"] == t and r["lr"] for r in results)]
    leaks = [r for r in results if r["task"] == "citing"]
    down = len(tasks) + bool(leaks)
    if not down:
        return
    figure = Figure(figsize=(4.0 * len(PANELS), 4.0 * down), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, len(PANELS), squeeze=False)
    for axes, task in zip(grid, tasks, strict=False):
        for axis, (title, arms) in zip(axes, PANELS.items(), strict=True):
            axis.set_title(f"{task}: {title}", fontsize="medium")
            for i, arm in enumerate(arms):
                curve(axis, chosen(results, task, arm, rates[task][arm]), arm, f"C{i}")
            finish(axis, "student passes")
        axes[0].set_ylabel("greedy accuracy")
    for axis, arm in zip(grid[-1] if leaks else [], LEAKS, strict=False):
        axis.set_title(arm, fontsize="medium")
        for r in (r for r in leaks if r["arm"] == arm):
            axis.plot(range(1, len(r["leak_frac"]) + 1), r["leak_frac"], "C3", alpha=0.6)
            for step, name in r["warnings"]:
                if name == "leakage":
                    axis.axvline(step, color="black", linestyle=":")
        finish(axis, "rollouts")
    if leaks:
        grid[-1][0].set_ylabel("citing completions")
    figure.savefig(path, dpi=80)


def curve(axis: Any, runs: Sequence[Result], label: str, color: str) -> None:
    """Draw the mean over seeds at each validation that all runs have, and their range."""
    if not runs:
        return
    shortest = min(len(r["curve"]) for r in runs)
    values = [[r["curve"][i][1] for r in runs] for i in range(shortest)]
    passes = [statistics.fmean(r["curve"][i][0] for r in runs) for i in range(shortest)]
    axis.plot(passes, [statistics.fmean(v) for v in values], color, label=label)
    low, high = [min(v) for v in values], [max(v) for v in values]
    axis.fill_between(passes, low, high, color=color, alpha=0.15, linewidth=0)


def finish(axis: Any, across: str) -> None:
    """Set limits, grid, legend and the label below."""
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    axis.set_xlabel(across)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2))


def write(out: Path, results: Sequence[Result], rates: Rates) -> None:
    """Write the tables into the page, between its marks, and draw the picture."""
    page = out / "self_teachers.md"
    old = (page if page.exists() else PAGE).read_text()
    head, _, rest = old.partition(START)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{START}\n\n{tables(results, rates)}\n\n{END}{tail}")
    plot(results, rates, out / "self_teachers.png")
