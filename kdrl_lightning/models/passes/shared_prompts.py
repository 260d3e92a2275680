"""Finds what the rows of a batch have in common: equal rows, equal prompts and similar lengths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kdrl_lightning.common.layout import Rows
from kdrl_lightning.rollout_batch import upload

# Two passes may have at most this share of one pass's tokens: each pass has fixed costs.
SHARED_BELOW = 0.85
# Micro-batches to time on a GPU. We do not count the first one, which also loads the kernels.
TIMED = 4
# Smallest number of padded tokens in a pass: fewer would not keep a GPU busy.
LEAST_TOKENS = 4096
# Splitting a pass in two must save at least this share of its padded tokens.
LEAST_SAVING = 0.02

# Returns the seconds that some work takes.
Clock: TypeAlias = Callable[[Callable[[], object]], float]


def cuda_clock(work: Callable[[], object]) -> float:
    """Return the seconds that a GPU takes for some work."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass
class Sharing:
    """Decides whether a micro-batch runs shared prompts once, in two passes over fewer tokens.

    The first pass runs prompts, the second completions. A token of the second costs more: its
    attention has a mask, so it cannot use a flash kernel, and a prompt's keys and values are copied
    for each row. On a CPU this hardly matters, and the numbers of tokens decide. On a GPU we time
    both ways, without gradient, in the first micro-batches that could share; from then on, these
    times decide.

    Attributes:
        clock: times both ways; None: the numbers of tokens decide.
        below: two passes pay if they have at most this share of one pass's tokens.
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
    """The R distinct rows of a batch, and their P distinct prompts.

    Attributes:
        of: ``[B]``, index of each batch row among the distinct rows.
        first: ``[R]``, index in the batch of each distinct row's first copy.
        input_ids: ``[R, S]``, prompt and completion, padded on the right.
        prompt_lengths: ``[R]``.
        mask: ``[R, T]`` bool, True on the completions' tokens.
        prompts: ``[P, W]``, the distinct prompts, padded on the right with -1.
        prompt_of: ``[R]``, index of each distinct row's prompt.
        unequal: whether the prompts have different lengths.
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
        """Return a copy on ``device``."""
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
    """Indices of the N tokens to score.

    Attributes:
        rows: ``[N]``, each token's row: in the batch, or among the distinct rows if these are
            scored once.
        columns: ``[N]``, each token's index in its completion.
        states: ``[N]``, the row whose hidden states predict it: a distinct row, if rows are merged.
        among: ``[N]``, its index among all completion tokens of the batch.
    """

    rows: Tensor
    columns: Tensor
    states: Tensor
    among: Tensor


def places_of(mask: Tensor, merged: MergedRows | None, once: bool, device: torch.device) -> Places:
    """Find the tokens to score on the CPU; return their indices on ``device``.

    Args:
        mask: ``[B, T]`` bool, True on the completions' tokens, on the CPU.
        merged: the batch's distinct rows, on the CPU; None if every row runs in full.
        once: score equal rows once.
        device: device of the result.
    """
    number = mask.flatten().cumsum(0).view_as(mask) - 1
    if merged is not None and once:
        mask, number = merged.mask, number[merged.first]
    rows, columns = mask.nonzero(as_tuple=True)
    states = rows if merged is None or once else merged.of[rows]
    return Places(*(upload(x, device) for x in (rows, columns, states, number[mask])))


def on_host(ids: Tensor, prompt_lengths: Tensor, mask: Tensor) -> Rows:
    """Return ids ``[B, S]``, lengths ``[B]`` and mask ``[B, T]`` on the CPU.

    Shapes depend on what rows have in common, and the host would wait for a GPU for each of them.
    With one copy of all three it waits once.
    """
    if ids.device.type == "cpu":
        return ids, prompt_lengths, mask
    packed = torch.cat([prompt_lengths[:, None], ids, mask.long()], 1).cpu()
    end = 1 + ids.shape[1]
    return packed[:, 1:end], packed[:, 0], packed[:, end:].bool()


def merge_rows(input_ids: Tensor, prompt_lengths: Tensor, mask: Tensor) -> MergedRows:
    """Find the distinct rows and prompts of ``[B, S]`` ids with completions ``mask [B, T]``.

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


def lengths_of(host: Rows, merged: MergedRows | None) -> Tensor:
    """Return the lengths of rows on the CPU, as ``on_host`` returns them, or of ``merged``."""
    prompts, mask = host[1:] if merged is None else (merged.prompt_lengths, merged.mask)
    return prompts + mask.sum(1)


class WidthClass(NamedTuple):
    """Rows that run in one pass.

    Attributes:
        rows: their indices.
        width: length of the longest one, to which the others are padded.
    """

    rows: list[int]
    width: int

    @property
    def tokens(self) -> int:
        """Number of tokens of the pass, with padding."""
        return len(self.rows) * self.width


def width_classes(lengths: Sequence[int]) -> list[WidthClass]:
    """Return the passes for rows of these lengths, shortest rows first.

    We split a pass in two where this saves the most padding, until no split saves enough.

    Args:
        lengths: number of tokens of each row.

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


def length_classes(lengths: Sequence[int]) -> list[WidthClass]:
    """Return a pass for each length, shortest rows first, for models whose rows must not be padded.

    >>> length_classes([3, 5, 3])
    [WidthClass(rows=[0, 2], width=3), WidthClass(rows=[1], width=5)]
    """
    rows: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows.setdefault(length, []).append(row)
    return [WidthClass(rows[length], length) for length in sorted(rows)]


def _best_cut(ascending: list[int]) -> int:
    """Return how many of the shortest rows to split off; 0: all run together."""
    n, width = len(ascending), ascending[-1]
    found = {
        i: i * ascending[i - 1] + (n - i) * width
        for i in range(1, n)
        if min(i * ascending[i - 1], (n - i) * width) >= LEAST_TOKENS
    }
    best = min(found, key=found.__getitem__, default=0)
    return best if best and found[best] <= (1 - LEAST_SAVING) * n * width else 0
