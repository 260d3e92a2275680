"""A reward that is fine on the empty completion of the setup check and fails on real ones."""

from __future__ import annotations

from kdrl_lightning.rewards import Sample


def judge(sample: Sample) -> float:
    return 1 / 0 if sample.ids else 0.0
