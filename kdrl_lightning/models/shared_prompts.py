"""What the completions of a batch have in common: equal rows, and prompts of several rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """

    of: Tensor
    first: Tensor
    input_ids: Tensor
    prompt_lengths: Tensor
    mask: Tensor
    prompts: Tensor
    prompt_of: Tensor


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
    return MergedRows(of, first, input_ids[first], lengths, mask[first], prompts, prompt_of)
