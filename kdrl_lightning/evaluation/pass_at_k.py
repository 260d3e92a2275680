"""pass@k: the probability that one of k completions of a prompt is right."""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """Estimate pass@k of each prompt from n completions, without bias.

    1 - C(n - c, k) / C(n, k) with c right ones (Chen et al., arXiv 2107.03374): the part of all
    subsets of k that hold a right one. Binomials are exact integers.

    >>> pass_at_k(torch.tensor([[True, False, False]]), k=2)
    tensor([0.6667], dtype=torch.float64)

    Args:
        correct: ``[P, n]`` bool.
        k: from 1 to n.

    Returns:
        ``[P]`` float64.

    Raises:
        ValueError: k is larger than n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"`k` must be from 1 to the {n} completions of a prompt: got {k}.")
    by_count = [1.0 - comb(n - c, k) / comb(n, k) for c in range(n + 1)]
    table = torch.tensor(by_count, dtype=torch.float64, device=correct.device)
    return table[correct.sum(1)]
