"""Formats a plan as text for a terminal."""

from __future__ import annotations

from kdrl_lightning.hardware.planning.planner import Phase, Plan

SAYS = {
    "sample": "completions are sampled",
    "score": "teacher, reference and student score them",
    "update": "the largest micro-batch, forward and backward",
    "step": "gradients are clipped and applied",
    "push": "the engine gets the weights",
}


def report(made: Plan) -> str:
    """Return a plan as a table, with notes and the verdict."""
    lines = ["Memory on one rank at the peak of each phase, by calculation:", ""]
    lines += [f"  {'phase':<8}{'GB':>8}   of which"]
    lines += [_row(phase) for phase in made.phases]
    lines += [""]
    lines += [f"  largest micro-batch      {made.tokens:,} tokens"]
    if made.memory is not None:
        largest = "not even one completion" if made.largest is None else f"{made.largest:,} tokens"
        lines += [f"  what fits                {largest} (`max_tokens_per_micro_batch`)"]
    lines += [f"  tables of a head chunk   {made.head / 1e9:.2f} GB, in the workspace"]
    lines += [f"  a checkpoint             {gb(made.checkpoint)} GB on disk, {made.kept} kept"]
    for name, seconds in made.seconds.items():
        lines += [
            f"  a rollout on {name:<12}{seconds.total:,.0f} s: sample {seconds.sample:,.0f}, score "
            f"{seconds.score:,.0f}, update {seconds.update:,.0f} (calculated, not measured; ± 50 %)"
        ]
    lines += ["", *(f"  note: {note}." for note in made.notes), ""]
    return "\n".join([*lines, verdict(made)])


def verdict(made: Plan) -> str:
    """Return in one line whether the run fits, and what to set if it does not."""
    worst = made.worst
    if made.memory is None:
        return f"It needs {gb(worst.total)} GB, in {worst.name}. Give `--gpu-memory` for a verdict."
    if made.fits:
        spare = made.memory - worst.total
        return f"It fits: {worst.name} needs most, and leaves {gb(spare)} GB."
    cure = f"Set {' '.join(made.cures)}."
    if not made.cures:
        cure = "Use more GPUs, `model.lora`, or servers that sample on other cards."
    return (
        f"It does not fit: {worst.name} ({SAYS[worst.name]}) needs {gb(worst.total)} GB of "
        f"{gb(made.memory)} GB. {cure}"
    )


def gb(size: float) -> str:
    """Return bytes as GB.

    >>> gb(1.26e9), gb(123.4e6)
    ('1.3', '0.12')
    """
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"


def _row(phase: Phase) -> str:
    parts = sorted(phase.parts.items(), key=lambda item: -item[1])
    words = ", ".join(f"{name} {gb(size)}" for name, size in parts if size >= 5e5)
    return f"  {phase.name:<8}{gb(phase.total):>8}   {words}"
