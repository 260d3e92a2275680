"""What the rows of a batch have in common: equal rows, prompts of several, and similar lengths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kdrl_lightning.rollout_batch import upload

# Two passes must save at least this share of the tokens: each has fixed costs.
SHARED_BELOW = 0.85
# Micro-batches that are timed on a GPU. The first one also pays for starting the kernels.
TIMED = 4
# Padded tokens of a pass, at least: a GPU would not be busy with fewer.
LEAST_TOKENS = 4096
# Share of its padded tokens that cutting a pass in two must save.
LEAST_SAVING = 0.02

# Returns the seconds that some work takes.
Clock: TypeAlias = Callable[[Callable[[], object]], float]


def cuda_clock(work: Callable[[], object]) -> float:
    """Return the seconds in which a GPU does some work."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass
class Sharing:
    """Decides whether a micro-batch runs its prompts once, in two passes over fewer tokens.

    A token of the second pass costs more: its attention has a mask, so it takes no flash kernel,
    and a prompt's keys and values are copied for each row. On a CPU that hardly shows, and the
    tokens decide. On a GPU both ways are timed, without gradient, in the first micro-batches that
    could share; from then on the way with fewer seconds by these times is taken.

    Attributes:
        clock: times both ways; None: tokens decide.
        below: share of the tokens from which two passes are worth it.
    """

    clock: Clock | None = None
    below: float = SHARED_BELOW
    _found: list[float] = field(default_factory=list)

    def pays(
        self,
        shared: int,
        whole: int,
        once: Callable[[], object],
        each: Callable[[], object],
    ) -> bool:
        """Return whether to run the prompts once.

        Args:
            shared: tokens of the two passes that run prompts once.
            whole: tokens of the one pass that runs them for each row.
            once: runs the two passes.
            each: runs the one pass.
        """
        if self.clock is not None and shared < whole and len(self._found) < TIMED:
            with torch.no_grad():
                of_shared = self.clock(once) / shared
                self._found.append(self.clock(each) / whole / of_shared)
            if len(self._found) == TIMED:
                self.below = statistics.median(self._found[1:])
        return shared <= self.below * whole


@dataclass(frozen=True)
class MergedRows:
    """The different rows of a batch, and their different prompts.

    Attributes:
        of: ``[B]``, for each row of the batch its place among the different ones.
        first: ``[R]``, where in the batch each of them comes first.
        input_ids: ``[R, S]``, prompt and completion, padded on the right.
        prompt_lengths: ``[R]``.
        mask: ``[R, T]`` bool, the completions' tokens.
        prompts: ``[P, W]``, the different prompts, -1 after their end.
        prompt_of: ``[R]``, each row's prompt.
        unequal: the prompts have different lengths.
    """

    of: Tensor
    first: Tensor
    input_ids: Tensor
    prompt_lengths: Tensor
    mask: Tensor
    prompts: Tensor
    prompt_of: Tensor
    unequal: bool

    def to(self, device: torch.device) -> MergedRows:
        """Return a copy on a device."""
        return MergedRows(
            upload(self.of, device),
            upload(self.first, device),
            upload(self.input_ids, device),
            upload(self.prompt_lengths, device),
            upload(self.mask, device),
            upload(self.prompts, device),
            upload(self.prompt_of, device),
            self.unequal,
        )


class Places(NamedTuple):
    """Where the tokens to score are.

    Attributes:
        rows: ``[N]``, their completions: of the batch, or of the different rows.
        columns: ``[N]``, their places in these.
        states: ``[N]``, the rows whose states predict them.
        among: ``[N]``, their numbers among all completion tokens of the batch.
    """

    rows: Tensor
    columns: Tensor
    states: Tensor
    among: Tensor


def places_of(mask: Tensor, merged: MergedRows | None, once: bool, device: torch.device) -> Places:
    """Find the tokens to score on the host; return their places on a device.

    Args:
        mask: ``[B, T]`` bool, the completions' tokens, on the CPU.
        merged: what rows have in common, on the CPU; None if that is not used.
        once: equal rows are scored once.
        device: of the result.
    """
    number = mask.flatten().cumsum(0).view_as(mask) - 1
    if merged is not None and once:
        mask, number = merged.mask, number[merged.first]
    rows, columns = mask.nonzero(as_tuple=True)
    states = rows if merged is None or once else merged.of[rows]
    return Places(*(upload(x, device) for x in (rows, columns, states, number[mask])))


def on_host(ids: Tensor, prompt_lengths: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids ``[B, S]``, lengths ``[B]`` and mask ``[B, T]`` on the CPU.

    What rows have in common decides shapes, for each of which the host would wait for a GPU. So it
    waits once, for one copy of all three.
    """
    if ids.device.type == "cpu":
        return ids, prompt_lengths, mask
    packed = torch.cat([prompt_lengths[:, None], ids, mask.long()], 1).cpu()
    end = 1 + ids.shape[1]
    return packed[:, 1:end], packed[:, 0], packed[:, end:].bool()


def merge_rows(input_ids: Tensor, prompt_lengths: Tensor, mask: Tensor) -> MergedRows:
    """Find the different rows and prompts of ``[B, S]`` ids with completions ``mask [B, T]``.

    >>> rows = merge_rows(
    ...     torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 8]]),
    ...     torch.tensor([2, 2, 2]),
    ...     torch.ones(3, 1, dtype=torch.bool),
    ... )
    >>> rows.of.tolist(), rows.input_ids.tolist(), rows.prompts.tolist()
    ([0, 0, 1], [[5, 6, 7], [5, 6, 8]], [[5, 6]])
    """
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    ends = prompt_lengths + mask.sum(1)
    whole = input_ids.masked_fill(place >= ends[:, None], -1)
    table = torch.cat([prompt_lengths[:, None], whole], 1)
    different, of = table.unique(dim=0, return_inverse=True)
    if len(different) < len(table):
        rows = torch.arange(len(of), device=of.device)
        first = of.new_zeros(len(different)).scatter_reduce_(
            0, of, rows, "amin", include_self=False
        )
    else:
        first, of = (torch.arange(len(of), device=of.device),) * 2
    lengths = prompt_lengths[first]
    prompts = whole[first].masked_fill(place >= lengths[:, None], -1)[:, : int(lengths.max())]
    prompts, prompt_of = prompts.unique(dim=0, return_inverse=True)
    unequal = bool((prompts < 0).any())
    return MergedRows(
        of, first, input_ids[first], lengths, mask[first], prompts, prompt_of, unequal
    )


class WidthClass(NamedTuple):
    """Rows that run in one pass.

    Attributes:
        rows: their places in the batch.
        width: tokens of the longest one.
    """

    rows: list[int]
    width: int

    @property
    def tokens(self) -> int:
        """Tokens of the pass, with padding."""
        return len(self.rows) * self.width


def width_classes(lengths: Sequence[int]) -> list[WidthClass]:
    """Return the passes for rows of these lengths, shortest rows first.

    A pass is cut in two, where that saves most, until no cut saves enough.

    Args:
        lengths: tokens of each row.

    >>> [c.rows for c in width_classes([2000, 8000, 2100, 7900])], width_classes([5, 9])
    ([[0, 2], [3, 1]], [WidthClass(rows=[0, 1], width=9)])
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends, bounds = [], [0, len(order)]
    while len(bounds) > 1:
        first, last = bounds[0], bounds[1]
        cut = _best_cut([lengths[r] for r in order[first:last]])
        if cut:
            bounds.insert(1, first + cut)
        else:
            ends.append(bounds.pop(0))
    return [WidthClass(order[a:b], lengths[order[b - 1]]) for a, b in pairwise([*ends, len(order)])]


def _best_cut(ascending: list[int]) -> int:
    """Return how many of the shortest rows run by themselves; 0: all run together."""
    n, width = len(ascending), ascending[-1]
    found = {
        i: i * ascending[i - 1] + (n - i) * width
        for i in range(1, n)
        if min(i * ascending[i - 1], (n - i) * width) >= LEAST_TOKENS
    }
    best = min(found, key=found.__getitem__, default=0)
    return best if best and found[best] <= (1 - LEAST_SAVING) * n * width else 0
