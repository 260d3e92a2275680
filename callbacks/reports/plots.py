"""Plots of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# `Any`: matplotlib's axes and styles, and the content of `summary.json`.

if TYPE_CHECKING:
    from kdrl_lightning.metrics import Histogram


def plot_curves(
    path: Path,
    curves: Sequence[Mapping[str, float]],
    accuracy: Sequence[tuple[float, float]],
    summary: Mapping[str, Any],
) -> None:
    """Draw accuracy, teacher KL, shares of tokens and completion length over rollouts.

    Args:
        path: the PNG file to write.
        curves: one row per rollout, with ``rollout`` and the logged metrics.
        accuracy: (rollout, validation accuracy) pairs; accuracy is in [0, 1].
        summary: the run's summary; we show its ``method``, ``seed``, ``teacher_accuracy``, and
            ``warnings`` (rollouts by name).
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
    line(axis, "health/leak_frac", "completions that leak", color="tab:red")
    line(axis, "health/repeat_frac", "repeated n-grams", color="tab:brown")
    axis.set_ylim(-0.02, 1.02)
    axis = grid[1, 1]
    axis.set_title("completion length, tokens")
    line(axis, "rollout/length_mean", "mean", color="tab:gray")
    lengths = [row["rollout/length_mean"] for row in curves if "rollout/length_mean" in row]
    axis.set_ylim(0, 1.15 * max(lengths, default=1.0))
    for name, rollout in summary.get("warnings", {}).items():
        for axis in grid.flat:
            axis.axvline(rollout, color="black", ls=":", alpha=0.6)
        grid[0, 0].annotate(name, (rollout, 0.02), rotation=90, fontsize="x-small", va="bottom")
    for axis in grid.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        else:
            axis.text(0.5, 0.5, "no teacher", ha="center", transform=axis.transAxes)
    for axis in grid[1]:
        axis.set_xlabel("rollouts")
    figure.savefig(path, dpi=110)


PANELS = (
    (
        "imitated share",
        {
            "kd/imitation_frac": "tokens",
            "kd/imitated_completions_frac": "completions",
            "kd/imitated_groups_frac": "groups",
        },
    ),
    (
        "policy gradient removed, share",
        {"kd/dead_frac_pos": "of tokens with A > 0", "kd/dead_frac_neg": "of tokens with A < 0"},
    ),
    (
        "KL(student || teacher), nats per token",
        {"kd/reverse_kl_correct": "correct", "kd/reverse_kl_wrong": "wrong"},
    ),
    (
        "agreement, share",
        {
            "kd/top_token_agreement": "same best token",
            "kd/conflict_frac": "A against teacher",
            "kd/strong_conflict_frac": "by more than a factor of 2",
        },
    ),
    ("TRRD weight w", {"kd/offset_weight_p99": "99 %", "kd/offset_weight_max": "max"}),
)


def plot_imitation(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    histograms: Mapping[int, Mapping[str, Histogram]],
) -> None:
    """Draw the imitation statistics over rollouts, and the gap's first and last histogram.

    Args:
        path: the PNG file to write.
        rows: one row per rollout, with ``rollout`` and the imitation statistics.
        histograms: histograms by rollout and name; we show ``hist/teacher_gap``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flat
    for axis, (title, names) in zip(axes, PANELS, strict=False):
        axis.set_title(title)
        axis.set_xlabel("rollouts")
        for name, label in names.items():
            points = [(row["rollout"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
    axis = axes[-1]
    axis.set_title("teacher gap d = log π_T − log π, tokens")
    axis.set_xlabel("nats")
    shown = [r for r in sorted(histograms) if "hist/teacher_gap" in histograms[r]]
    for rollout in dict.fromkeys(shown[:1] + shown[-1:]):
        histogram = histograms[rollout]["hist/teacher_gap"]
        width = max(len(histogram.counts) // 50, 1)  # about 50 bars if there are enough bins
        starts = range(0, len(histogram.counts), width)
        counts = [float(histogram.counts[i : i + width].sum()) for i in starts]
        edges = [float(histogram.edges[i]) for i in starts] + [histogram.high]
        axis.stairs(counts, edges, label=f"rollout {rollout}")
        if any(counts):
            axis.set_yscale("log")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    figure.savefig(path, dpi=110)
