"""A reward that varies under a model with random weights."""

from __future__ import annotations

from kdrl_lightning.rewards import Sample


def even_length(sample: Sample) -> float:
    """Return 1 if the sum of the first tokens is even."""
    return float(sum(sample.ids[:4]) % 2 == 0)
