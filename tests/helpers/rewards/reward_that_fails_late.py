"""A reward that passes the check in setup and fails on real completions."""

from __future__ import annotations

from kdrl_lightning.rewards import Sample


def judge(sample: Sample) -> float:
    return 0.0 if sample.text in ("", sample.row["prompt"]) else 1 / 0
