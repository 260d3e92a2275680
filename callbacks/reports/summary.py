"""The table that a run prints at its end."""

from __future__ import annotations

from pathlib import Path

from kdrl_lightning.common.untyped import Tree


def summary_table(summary: Tree, folder: Path) -> str:
    """Return the lines that a run prints at its end.

    Args:
        summary: what ``summary.json`` holds.
        folder: of the run.
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
