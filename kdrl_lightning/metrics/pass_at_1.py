"""pass@1 as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PassAt1(Metric):
    """Probability that one completion of a prompt is correct, averaged over prompts.

    With n completions per prompt their mean estimates it without bias (arXiv 2107.03374). Uneven
    shards are right: every prompt counts once, whichever rank saw it.

    >>> metric = PassAt1()
    >>> metric.update(torch.tensor([[True, False], [True, True]]))
    >>> metric.compute()
    tensor(0.7500)
    """

    full_state_update = False
    higher_is_better = True
    solved: Tensor
    prompts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("solved", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """Add prompts: ``correct [P, n]`` bool, P may be 0."""
        if correct.dim() != 2:
            raise ValueError(f"`correct` must have shape [P, n]: got {list(correct.shape)}.")
        if correct.shape[0]:
            self.solved += correct.double().mean(1).sum()
        self.prompts += correct.shape[0]

    def compute(self) -> Tensor:
        """Return the rate in [0, 1]; NaN without prompts."""
        return (self.solved / self.prompts).float()
