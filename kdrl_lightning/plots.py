"""The picture of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_curves(
    path: Path,
    curves: Sequence[Mapping[str, float]],
    accuracy: Sequence[tuple[float, float]],
    summary: Mapping[str, Any],
) -> None:
    """Draw accuracy, teacher KL, imitation and completion length over rollouts.

    Args:
        path: PNG to write.
        curves: one row per rollout with ``rollout`` and metrics.
        accuracy: (rollout, validation accuracy) pairs.
        summary: of the run; ``method`` and ``teacher_accuracy`` are shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{summary['method']}, seed {summary.get('seed')}")
    grid = figure.subplots(2, 2, sharex=True)

    def line(axis: Any, name: str, label: str, **style: Any) -> None:
        points = [(row["rollout"], row[name]) for row in curves if name in row]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    axis = grid[0, 0]
    axis.set_title("accuracy")
    line(axis, "reward/correct_frac", "training samples", color="tab:blue", alpha=0.45)
    if accuracy:
        axis.plot(*zip(*accuracy, strict=True), "o-", color="tab:blue", label="validation")
    if summary.get("teacher_accuracy") is not None:
        axis.axhline(summary["teacher_accuracy"], color="tab:green", ls="--", label="teacher")
    axis.set_ylim(-0.02, 1.02)
    axis = grid[0, 1]
    axis.set_title("KL(student || teacher), nats per token")
    line(axis, "kd/reverse_kl_wrong", "wrong completions", color="tab:red", alpha=0.45)
    line(axis, "kd/reverse_kl", "all", color="tab:red")
    axis = grid[1, 0]
    axis.set_title("share of tokens")
    line(axis, "kd/imitation_frac", "imitated", color="tab:green")
    line(axis, "kd/dead_frac_pos", "dead, A > 0", color="tab:orange")
    line(axis, "kd/dead_frac_neg", "dead, A < 0", color="tab:purple")
    axis.set_ylim(-0.02, 1.02)
    axis = grid[1, 1]
    axis.set_title("completion length, tokens")
    line(axis, "rollout/length_mean", "mean", color="tab:gray")
    lengths = [row["rollout/length_mean"] for row in curves if "rollout/length_mean" in row]
    axis.set_ylim(0, 1.15 * max(lengths, default=1.0))
    for axis in grid.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        else:
            axis.text(0.5, 0.5, "no teacher", ha="center", transform=axis.transAxes)
    for axis in grid[1]:
        axis.set_xlabel("rollouts")
    figure.savefig(path, dpi=110)
