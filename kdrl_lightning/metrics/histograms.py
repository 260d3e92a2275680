"""Histograms with fixed edges, summed over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width.

    Attributes:
        counts: ``[N]``; the first and the last bin also count the values below and above the range.
        low: left edge of the first bin.
        high: right edge of the last bin.
    """

    counts: Tensor
    low: float
    high: float

    @property
    def edges(self) -> Tensor:
        """Edges of the bins, ``[N + 1]`` float64."""
        return torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.float64)

    def quantile(self, share: float) -> float:
        """Return the right edge of the bin that holds the quantile; NaN without values.

        Args:
            share: share of the values at or below the quantile, in [0, 1].

        >>> Histogram(torch.tensor([1.0, 2.0, 1.0, 0.0]), 0.0, 4.0).quantile(0.5)
        2.0
        """
        up_to = self.counts.cumsum(0)
        total = float(up_to[-1])
        if not total:
            return float("nan")
        reached = int(torch.searchsorted(up_to, share * total))
        return float(self.edges[reached + 1])


class Histograms:
    """Collects one histogram per name, each over a fixed range.

    Args:
        ranges: per name the left edge of the first bin and the right edge of the last one.
        bins: number of bins of each histogram.
    """

    def __init__(self, ranges: Mapping[str, tuple[float, float]], bins: int = 500) -> None:
        self.ranges = ranges
        self.bins = bins
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Count the values for which ``mask``, of their shape, is True; NaN is not counted."""
        low, high = self.ranges[name]
        place = (values.detach().float() - low) * (self.bins / (high - low))
        place = place.clamp_(0, self.bins - 1).nan_to_num_(self.bins)  # NaN: an extra bin
        place = place.where(mask, self.bins).long().flatten()
        # `bincount` and selecting by a mask would make the host wait for a GPU.
        counts = torch.zeros(self.bins + 1, dtype=torch.float64, device=place.device)
        counts = counts.scatter_add_(0, place, torch.ones_like(place, dtype=torch.float64))[:-1]
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts

    def compute(self, reduce: Callable[[Tensor, str], Tensor] | None) -> dict[str, Histogram]:
        """Return the histograms over all ranks, and start again with empty ones.

        Args:
            reduce: ``(tensor, "sum") -> tensor`` over ranks; None for one process.
        """
        counts, self._counts = self._counts, {}
        if not counts:
            return {}
        table = torch.stack(list(counts.values()))
        table = (reduce(table, "sum") if reduce else table).cpu()
        return {
            name: Histogram(row, *self.ranges[name])
            for name, row in zip(counts, table, strict=True)
        }
