"""pass@k: the probability that one of k completions of a prompt is right."""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """Return the unbiased estimate of each prompt's pass@k from n completions.

    1 - C(n - c, k) / C(n, k) with c right completions (Chen et al., arXiv 2107.03374): the share of
    subsets of size k with at least one right completion. Binomials are exact integers.

    >>> pass_at_k(torch.tensor([[True, False, False]]), k=2)
    tensor([0.6667], dtype=torch.float64)

    Args:
        correct: ``[P, n]`` bool.
        k: size of a subset, from 1 to n.

    Returns:
        ``[P]`` float64.

    Raises:
        ValueError: k is not from 1 to n.
    """
    n = correct.shape[1]
    check_k(k, n)
    by_count = [1.0 - comb(n - c, k) / comb(n, k) for c in range(n + 1)]
    table = torch.tensor(by_count, dtype=torch.float64, device=correct.device)
    return table[correct.sum(1)]


def check_k(k: int, completions: int) -> None:
    """Raise a ValueError unless ``k`` is from 1 to the number of completions."""
    if not 1 <= k <= completions:
        raise ValueError(
            f"`k` must be from 1 to the {completions} completions of a prompt: got {k}. Sample "
            "more completions, or lower k."
        )
