"""What statistics ask of the module that is trained."""

from __future__ import annotations

import torch

from kdrl_lightning.objectives import Objective
from kdrl_lightning.rollout_batch import RolloutBatch


class FakeModule:
    """Keeps what is logged."""

    def __init__(self, objective: Objective, ranks: int = 1) -> None:
        self.objective, self.ranks = objective, ranks
        self.device = torch.device("cpu")
        self.logged: list[dict[str, float]] = []
        self.shapes: list[tuple[int, ...]] = []

    def reduce(self, value: torch.Tensor, operation: str) -> torch.Tensor:
        """As many ranks with the same values."""
        self.shapes.append(tuple(value.shape))
        return value * self.ranks if operation == "sum" else value

    def completed(self, batch: RolloutBatch) -> RolloutBatch:
        """Nothing is missing."""
        return batch

    def log_step(self, values: dict[str, float]) -> None:
        self.logged.append(values)
