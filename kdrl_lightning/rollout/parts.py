"""Means of what rewards are made of, over all ranks, whichever parts a rank has seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch

from kdrl_lightning.rewards.base import Verdict

Sums: TypeAlias = dict[str, tuple[float, int]]  # of each part: total and count


def part_means(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Return ``reward/<name>_mean`` of every part on any rank; collective.

    A part's mean is over the completions that have it: with a reward for each kind of row, not all
    have the same.
    """
    here: Sums = {}
    for verdict in verdicts:
        for name, value in verdict.parts.items():
            total, count = here.get(name, (0.0, 0))
            here[name] = total + value, count + 1
    totals: dict[str, list[tuple[float, int]]] = {}
    for sums in _gather(here):
        for name, pair in sums.items():
            totals.setdefault(name, []).append(pair)
    return {
        f"reward/{name}_mean": sum(total for total, _ in pairs) / sum(count for _, count in pairs)
        for name, pairs in sorted(totals.items())
    }


def _gather(here: Sums) -> list[Sums]:
    # Objects, not tensors: ranks need not know the same names.
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [here]
    ranks: list[Sums] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(ranks, here)
    return ranks
