"""The tables that a run prints at its end."""

from __future__ import annotations

from pathlib import Path

from kdrl_lightning.common.untyped import Tree


def summary_table(summary: Tree, folder: Path) -> str:
    """Return the lines that a run prints at its end.

    Args:
        summary: what ``summary.json`` holds.
        folder: the run folder.
    """

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    rows = [
        ("method", summary["method"]),
        ("student before", share(summary["student_accuracy_before"])),
        ("student after", share(summary["student_accuracy_after"])),
        ("teacher", share(summary["teacher_accuracy"])),
        ("rollouts", f"{summary['rollouts']} ({summary['optimizer_steps']} optimizer steps)"),
        (
            "time",
            f"{summary['wall_seconds']:.0f} s (rollouts {summary['rollout_seconds']:.0f} s, "
            f"scoring {summary['score_seconds']:.0f} s, updates {summary['train_seconds']:.0f} s; "
            f"of these the teacher {summary['teacher_seconds']:.1f} s)",
        ),
        ("warnings", ", ".join(summary["warnings"]) or "-"),
        ("run folder", str(folder)),
        ("trained student", summary["export_path"] or "-"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join(["", *lines, ""])


def imitation_table(rows: list[dict[str, float]], rollouts: int) -> str:
    """Render the mean of each statistic over the first and the last rollouts."""
    first, last = rows[:rollouts], rows[-rollouts:]

    def mean(part: list[dict[str, float]], name: str) -> str:
        values = [row[name] for row in part if name in row]
        return f"{sum(values) / len(values):10.3f}" if values else f"{'-':>10}"

    names = sorted({name for row in rows for name in row} - {"rollout"})
    title = "imitation, mean over rollouts"
    width = max(map(len, [title, *names]))
    head = f"  {title:<{width}}  {'first ' + str(len(first)):>10}"
    lines = [f"{head}  {'last ' + str(len(last)):>10}"]
    lines += [f"  {n:<{width}}  {mean(first, n)}  {mean(last, n)}" for n in names]
    return "\n".join(["", *lines])
