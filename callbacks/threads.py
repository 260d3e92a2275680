"""Sets the number of threads that torch uses on the CPU."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from kdrl_lightning.errors import require_count


class CPUThreads(pl.Callback):
    """Sets the number of torch's intra-op threads on a CPU; use 1 below a million parameters.

    In such a small model, several threads wait for each other after every matrix product. They are
    slower than one thread, and many times slower if other processes use the same cores. If the
    models are on a GPU, the callback does nothing.

    Args:
        threads: number of threads.
    """

    def __init__(self, threads: int = 1) -> None:
        require_count("threads", threads, 1, float("inf"))
        self.threads = threads

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the number before any model runs."""
        if trainer.strategy.root_device.type == "cpu":
            torch.set_num_threads(self.threads)
