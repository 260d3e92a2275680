"""Tables and pictures of the regimes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.regime_cases.methods import EVERY_METHOD
from benchmarks.regime_cases.tasks import Regime, Task

# `Any`: results as JSON holds them, matplotlib's axes.
START, END = "<!-- tables: start -->", "<!-- tables: end -->"
Result = Mapping[str, Any]


class Cells:
    """The runs of each cell, with the rate that the search has chosen.

    Args:
        task: says which cells share their runs.
        results: every run.
        rates: chosen rate by method.
    """

    def __init__(self, task: Task, results: Sequence[Result], rates: Mapping[str, float]) -> None:
        self.task = task
        self.results = results
        self.rates = rates

    def runs(self, method: str, regime: Regime) -> list[Result]:
        """Return the runs of a cell, by seed."""
        how, first = EVERY_METHOD[method], self.task.regimes[0]
        of = (
            method,
            regime.verifier if how.verdicts else first.verifier,
            regime.teacher if how.teacher else first.teacher,
            self.rates.get(method),
        )
        names = ("method", "verifier", "teacher", "lr")
        found = [r for r in self.results if tuple(r[name] for name in names) == of]
        return sorted(found, key=lambda r: int(r["seed"]))

    def mean(self, method: str, regime: Regime) -> float | None:
        """Return the mean greedy accuracy of a cell; None without runs."""
        runs = self.runs(method, regime)
        return statistics.mean(r["greedy"] for r in runs) if runs else None

    def text(self, method: str, regime: Regime) -> str:
        """Return ``mean (lowest–highest)`` and the number of seeds."""
        values = [r["greedy"] for r in self.runs(method, regime)]
        if not values:
            return "–"
        mean = f"{statistics.mean(values):.2f}"
        if len(values) == 1:
            return f"{mean} ×1"
        return f"{mean} ({min(values):.2f}–{max(values):.2f}) ×{len(values)}"

    @property
    def shared(self) -> list[Regime]:
        """The regimes in which every method with a separate search has runs."""
        methods = self.task.methods
        return [r for r in self.task.regimes if all(self.runs(m, r) for m in methods)]

    def worst(self, method: str) -> tuple[Regime, float] | None:
        """Return the shared regime with the lowest mean, and that mean; None if one lacks runs."""
        means = {regime: self.mean(method, regime) for regime in self.shared}
        known = {regime: mean for regime, mean in means.items() if mean is not None}
        if len(known) < len(means) or not known:
            return None
        lowest = min(known, key=lambda regime: known[regime])
        return lowest, known[lowest]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def tables(cells: Cells) -> str:
    """Return the tables: worst regimes, accuracies by teacher, and the ablation if there is one."""
    task = cells.task
    parts = [f"### Each method's worst regime: {task.title}", worst_table(cells)]
    for teacher in task.teachers:
        rows = [["method", *task.verifiers]]
        for method in (*task.methods, *task.variants):
            regimes = [Regime(verifier, teacher) for verifier in task.verifiers]
            if any(cells.runs(method, regime) for regime in regimes):
                rows.append([method, *(cells.text(method, regime) for regime in regimes)])
        parts += [f"### Teacher: {teacher}", markdown(rows)]
    if task.ablation:
        parts += ["### Gates × TRRD", ablation_table(cells)]
    return "\n\n".join(parts)


def worst_table(cells: Cells) -> str:
    """Return each method's rate, worst regime and mean, over the regimes that all have."""
    shared = cells.shared
    number = f"mean of {len(shared)} regimes"
    rows = [["method", "lr", "worst regime: verifier, teacher", "there", number]]
    every = (*cells.task.methods, *cells.task.variants, *cells.task.ablation)
    found = {method: cells.worst(method) for method in every}
    known = {method: worst for method, worst in found.items() if worst is not None}
    for method, (regime, _) in sorted(known.items(), key=lambda item: -item[1][1]):
        means = [cells.mean(method, r) or 0.0 for r in shared]
        where = f"{regime.verifier}, {regime.teacher}"
        there = cells.text(method, regime)
        mean = f"{statistics.mean(means):.2f}"
        rows.append([method, f"{cells.rates[method]:g}", where, there, mean])
    return markdown(rows)


def ablation_table(cells: Cells) -> str:
    """Return accuracy with and without the gates, by TRRD and by KDRL's KL."""
    columns = {
        "TRRD + gates": "RLAD α 0.5, offset clamp + gates",
        "TRRD": "RLAD α 0.5, offset clamp",
        "KL + gates": "KDRL + gates",
        "KL": "KDRL",
        "no teacher": "GRPO",
    }
    rows = [["verifier, teacher", *columns]]
    for regime in [Regime("exact", "good"), *cells.task.core]:
        row = [cells.text(method, regime) for method in columns.values()]
        rows.append([f"{regime.verifier}, {regime.teacher}", *row])
    return markdown(rows)


def heat_map(cells: Cells, path: Path) -> None:
    """Draw a panel per method: teachers over verifiers, coloured by mean greedy accuracy."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    task, across = cells.task, 4
    named = [*task.methods, *task.variants]
    methods = [m for m in named if any(cells.runs(m, regime) for regime in task.regimes)]
    down = -(-len(methods) // across)
    figure = Figure(figsize=(3.9 * across, 2.2 * down + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(methods) :]:
        axis.axis("off")
    image = None
    for index, (axis, method) in enumerate(zip(axes.flat, methods, strict=False)):
        table = [[cells.mean(method, Regime(v, t)) for v in task.verifiers] for t in task.teachers]
        values = np.array(table, dtype=float)
        image = axis.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = "white" if value < 0.6 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
        worst = cells.worst(method)
        title = method if worst is None else f"{method}   (worst {worst[1]:.2f})"
        axis.set_title(title, fontsize="medium")
        axis.set_xticks(range(len(task.verifiers)), list(task.verifiers), rotation=30, ha="right")
        axis.set_yticks(range(len(task.teachers)), list(task.teachers))
        axis.tick_params(labelbottom=index >= len(methods) - across)
    if image is not None:
        figure.supxlabel("verifier")
        figure.supylabel("teacher")
        figure.colorbar(image, ax=axes, label="greedy accuracy, true", shrink=0.8)
    figure.savefig(path, dpi=90)


PANELS = {
    "kd/dead_frac_pos": "dead, of A > 0",
    "kd/dead_frac_neg": "protected, of A < 0",
    "kd/strong_conflict_frac": "strong conflict",
    "kd/offset_weight_p99": "TRRD's w, 99 %",
}
EXPLAINED = ("GRPO", "KDRL", "RLAD α 0.5, offset clamp", "RLAD α 0.8, offset clamp", "RLAD α 0.5")


def why(cells: Cells, path: Path, seed: int) -> None:
    """Draw the statistics that explain the accuracies over rollouts, in the core regimes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    regimes = [Regime("exact", "good"), *cells.task.core]
    figure = Figure(figsize=(3.1 * len(regimes), 2.3 * len(PANELS) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(PANELS), len(regimes), sharex=True, sharey="row", squeeze=False)
    for column, regime in enumerate(regimes):
        grid[0][column].set_title(f"verifier: {regime.verifier}\nteacher: {regime.teacher}")
        for row, (name, title) in enumerate(PANELS.items()):
            axis = grid[row][column]
            for i, method in enumerate(EXPLAINED):
                runs = [r for r in cells.runs(method, regime) if r["seed"] == seed]
                values = runs[0].get("statistics", {}).get(name) if runs else None
                if values:
                    axis.plot(range(1, len(values) + 1), values, f"C{i}", label=method)
            axis.grid(alpha=0.3)
            if not column:
                axis.set_ylabel(title, fontsize="small")
    for axis in grid[-1]:
        axis.set_xlabel("rollouts")
    lines: dict[str, Any] = {}
    for axis in grid.flat:
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    if lines:
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    figure.savefig(path, dpi=80)


def write(out: Path, name: str, cells: Cells, seed: int) -> None:
    """Write the tables into the page, between its marks, and draw the pictures."""
    page, text = out / f"{name}.md", tables(cells)
    old = page.read_text() if page.exists() else f"{START}\n{END}\n"
    head, _, rest = old.partition(START)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{START}\n\n{text}\n\n{END}{tail}")
    heat_map(cells, out / f"{name}.png")
    if cells.task.ablation:
        why(cells, out / f"{name}_why.png", seed)
