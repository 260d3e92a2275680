"""A LightningModule that knows nothing of rollouts."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch


class OneWeight(pl.LightningModule):
    """A model with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight * batch.float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)
