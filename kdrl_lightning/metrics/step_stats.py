"""Statistics summed over the micro-batches and ranks of one optimizer step.

With gradient accumulation Lightning keeps only the last micro-batch of a step, and torchmetrics
would run one collective per metric. These statistics take two collectives per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Reduce = Callable[[Tensor, str], Tensor]


class StepStats:
    """Collects means, sums and maxima by name.

    >>> stats = StepStats()
    >>> stats.add_mean("length", torch.tensor([2.0, 4.0]), torch.tensor([True, True]))
    >>> stats.add_sum("loss", torch.tensor(0.5))
    >>> stats.compute()
    {'length': 3.0, 'loss': 0.5}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._maxima: dict[str, Tensor] = {}
        self._shown: set[str] = set()

    def add_mean(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add values to a mean; ``mask``, of their shape, is nonzero for those that count."""
        values = values.detach()
        if mask is None:
            mask = torch.ones_like(values, dtype=torch.bool)
        mask = mask if mask.dtype == torch.bool else mask != 0
        count = mask.count_nonzero()
        if values.dtype == torch.bool:
            total = (values & mask).count_nonzero()
        else:
            total = values.where(mask, 0.0).sum(dtype=torch.float64)
        if name in self._sums:
            old_total, old_count = self._sums[name]
            assert old_count is not None, f"{name} is a sum"
            total, count = total + old_total, count + old_count
        self._sums[name] = (total, count)

    def add_sum(self, name: str, value: Tensor) -> None:
        """Add a scalar to a sum."""
        value = value.detach().double()
        if name in self._sums:
            old, count = self._sums[name]
            assert count is None, f"{name} is a mean"
            value = value + old
        self._sums[name] = (value, None)

    def add_max(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Keep the largest value; ``mask``, of their shape, is nonzero for those that count."""
        values = values.detach().where(mask != 0, -torch.inf)
        value = values.max() if values.numel() else values.new_full((), -torch.inf)
        value = value.double()
        old = self._maxima.get(name)
        self._maxima[name] = value if old is None else torch.maximum(old, value)

    def compute(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Return the step's values and start again; a mean over nothing is left out.

        Args:
            reduce: ``(tensor, "sum" or "max") -> tensor`` over ranks; None for one process.
        """
        sums, maxima = self._sums, self._maxima
        self._sums, self._maxima = {}, {}
        out: dict[str, float] = {}
        if sums:
            one = torch.ones_like(next(iter(sums.values()))[0])
            flat = [x for total, n in sums.values() for x in (total, one if n is None else n)]
            table = torch.stack(flat).double().view(-1, 2)
            table = reduce(table, "sum") if reduce else table
            for (name, (_, count)), (total, number) in zip(
                sums.items(), table.tolist(), strict=True
            ):
                if count is None:
                    out[name] = total
                elif number:
                    out[name] = total / number
        if maxima:
            row = torch.stack(list(maxima.values()))
            row = reduce(row, "max") if reduce else row
            for name, value in zip(maxima, row.tolist(), strict=True):
                if value != -torch.inf:
                    out[name] = value
        return out

    def with_gaps(self, values: Mapping[str, float]) -> dict[str, float | None]:
        """Return the values, with None for names that only an earlier step measured.

        Without None a log would repeat the earlier value. Names that begin with ``rollout/`` get no
        None: one step measures their values for all steps of the rollout.
        """
        gaps = dict.fromkeys(self._shown - values.keys())
        self._shown |= {name for name in values if not name.startswith("rollout/")}
        return {**values, **gaps}

    def state_dict(self) -> list[str]:
        """Return the names that get None if a step does not measure them."""
        return sorted(self._shown)

    def load_state_dict(self, state_dict: Iterable[str]) -> None:
        """Restore the names, so that the first step after a resume leaves the same gaps."""
        self._shown = set(state_dict)
