"""Samples for loggers that show text: TensorBoard and W&B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdrl_lightning.reports.page import Section
from kdrl_lightning.reports.text import visible
from kdrl_lightning.reports.views import SampleView


def log_samples(loggers: Sequence[Any], section: Section, step: int) -> None:
    """Send samples to the loggers that can show them, as ``samples/<where from>``."""
    for logger in loggers:
        for name, samples in section.groups.items():
            tag = f"samples/{name}".replace(" ", "_")
            if hasattr(logger.experiment, "add_text"):  # TensorBoard
                logger.experiment.add_text(tag, as_markdown(samples), step)
            elif type(logger).__name__ == "WandbLogger":
                rows = [as_row(sample) for sample in samples]
                logger.log_text(
                    tag, columns=list(rows[0]), data=[[*r.values()] for r in rows], step=step
                )


def as_markdown(samples: Sequence[SampleView]) -> str:
    """Render samples as indented code, which no text can leave: every line of it is indented."""
    return "\n\n".join(
        "\n".join(f"    {line}" for text in as_lines(sample) for line in text.splitlines() or [""])
        for sample in samples
    )


def as_lines(sample: SampleView) -> list[str]:
    """Return verdict, prompt, completion, and each token with the teacher's gap."""
    verdict = "right" if sample.correct else "wrong"
    parts = "".join(f", {name} {value:.4g}" for name, value in sample.parts.items())
    lines = [f"{verdict}, reward {sample.reward:.4g}{parts}", "prompt:", visible(sample.prompt)]
    lines += ["completion:", visible(sample.completion)]
    if gaps := _gaps(sample):
        lines += ["teacher's gap of each token:", gaps]
    return lines


def as_row(sample: SampleView) -> dict[str, Any]:
    """Return the columns of a table of samples."""
    return {
        "prompt": sample.prompt,
        "completion": sample.completion,
        "reward": sample.reward,
        "parts": str(dict(sample.parts)),
        "correct": sample.correct,
        "teacher_gap": _gaps(sample),
    }


def _gaps(sample: SampleView) -> str:
    tokens = [t for t in sample.tokens if t.gap is not None]
    return " ".join(f"{visible(t.text).strip() or '·'}({t.gap:+.2f})" for t in tokens)
