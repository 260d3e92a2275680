"""How many threads torch may use on the CPU."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from kdrl_lightning.errors import require_between


class CPUThreads(pl.Callback):
    """Sets torch's intra-operation threads on a CPU: for models of under a million parameters, one.

    Threads that wait for each other after every small matrix product are slower than one thread
    alone, and many times slower where other processes hold a core. Where the models are on a GPU
    nothing is set.

    Args:
        threads: number of threads.
    """

    def __init__(self, threads: int = 1) -> None:
        require_between("threads", threads, 1, float("inf"))
        self.threads = threads

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the number before any model runs."""
        if trainer.strategy.root_device.type == "cpu":
            torch.set_num_threads(self.threads)
