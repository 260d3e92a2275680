"""The prompts that several completions of a batch have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedPrompts:
    """The different prompts of a batch.

    Attributes:
        ids: ``[P, W]``, the different prompts, padded with -1 on the right.
        of: ``[B]``, the place of each row's prompt among them.
    """

    ids: Tensor
    of: Tensor


def shared_prompts(input_ids: Tensor, prompt_lengths: Tensor) -> SharedPrompts:
    """Find the different prompts of rows.

    Args:
        input_ids: ``[B, S]``, prompt and completion, padded on the right.
        prompt_lengths: ``[B]``.

    >>> rows = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 6, 7]])
    >>> prompts = shared_prompts(rows, torch.tensor([2, 2, 1]))
    >>> prompts.ids.tolist(), prompts.of.tolist()
    ([[5, -1], [5, 6]], [1, 1, 0])
    """
    column = torch.arange(int(prompt_lengths.max()), device=input_ids.device)
    ids = input_ids[:, : len(column)].masked_fill(column >= prompt_lengths[:, None], -1)
    return SharedPrompts(*ids.unique(dim=0, return_inverse=True))
