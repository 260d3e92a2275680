"""Sends samples and histograms to the loggers that can show them: TensorBoard and W&B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_lightning.callbacks.reports.page import Section
from kdrl_lightning.callbacks.reports.text import visible
from kdrl_lightning.callbacks.reports.views import SampleView
from kdrl_lightning.common.untyped import Tree
from kdrl_lightning.metrics import Histogram

# `Any`: loggers share no type, and a row of their tables holds several.


def log_samples(loggers: Sequence[Any], section: Section, step: int) -> None:
    """Send samples to the loggers that can show text, as ``samples/<group's name>``.

    Args:
        loggers: the trainer's loggers; those that cannot show text are skipped.
        section: samples by group.
        step: the optimizer step.
    """
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


def log_histograms(loggers: Sequence[Any], histograms: Mapping[str, Histogram], step: int) -> None:
    """Send histograms to the loggers that can show them.

    Args:
        loggers: the trainer's loggers; others are skipped.
        histograms: histograms by name.
        step: the optimizer step, for TensorBoard; W&B uses its current step.
    """
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        for name, histogram in histograms.items():
            counts, edges = histogram.counts, histogram.edges
            if hasattr(experiment, "add_histogram_raw"):  # TensorBoard
                centers = (edges[1:] + edges[:-1]) / 2
                experiment.add_histogram_raw(
                    name,
                    min=histogram.low,
                    max=histogram.high,
                    num=int(counts.sum()),
                    sum=float((counts * centers).sum()),
                    sum_squares=float((counts * centers.square()).sum()),
                    bucket_limits=edges[1:].tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=step,
                )
            elif type(logger).__name__ == "WandbLogger":
                import wandb  # type: ignore[import-not-found]

                pair = (counts.numpy(), edges.numpy())
                experiment.log({name: wandb.Histogram(np_histogram=pair)})


def as_markdown(samples: Sequence[SampleView]) -> str:
    """Render samples as a Markdown code block, by indentation, which no text can end."""
    return "\n\n".join(
        "\n".join(f"    {line}" for text in as_lines(sample) for line in text.splitlines() or [""])
        for sample in samples
    )


def as_lines(sample: SampleView) -> list[str]:
    """Return a sample as lines of text: verdict, prompt, completion, and the teacher's gaps."""
    verdict = "right" if sample.correct else "wrong"
    parts = "".join(f", {name} {value:.4g}" for name, value in sample.parts.items())
    lines = [f"{verdict}, reward {sample.reward:.4g}{parts}", "prompt:", visible(sample.prompt)]
    if sample.teacher_prompt:
        lines += ["the teacher reads:", visible(sample.teacher_prompt)]
    lines += ["completion:", visible(sample.completion)]
    if gaps := _gaps(sample):
        lines += ["teacher's gap of each token:", gaps]
    return lines


def as_row(sample: SampleView) -> Tree:
    """Return a sample as one row of a table, by column name."""
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
