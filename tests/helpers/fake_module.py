"""A stand-in for the module that is trained, with what statistics read of it."""

from __future__ import annotations

import torch

from kdrl_lightning.objectives import Objective
from kdrl_lightning.rollout_batch import RolloutBatch


class FakeModule:
    """Has an objective and a number of ranks, and keeps the numbers that are logged."""

    def __init__(self, objective: Objective, ranks: int = 1) -> None:
        self.objective, self.ranks = objective, ranks
        self.device = torch.device("cpu")
        self.logged: list[dict[str, float]] = []
        self.shapes: list[tuple[int, ...]] = []

    def reduce(self, value: torch.Tensor, operation: str) -> torch.Tensor:
        """Reduce as if all ranks had the same value."""
        self.shapes.append(tuple(value.shape))
        return value * self.ranks if operation == "sum" else value

    def completed(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch: no score is missing."""
        return batch

    def log_step(self, values: dict[str, float]) -> None:
        self.logged.append(values)
