"""Short runs on a pretended GPU, with what makes the host wait, by phase."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from helpers.pretend_cuda import CUDA, pretend_cuda, to_card, waits


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Accept any device."""


class OnCard(SingleDeviceStrategy):
    """Trains on the pretended GPU."""

    def __init__(self) -> None:
        super().__init__(CUDA, accelerator=_Accelerator())

    def model_to_device(self) -> None:
        """Move the module's parameters; tied ones stay tied."""
        to_card(self.model)


@dataclass
class Phases(pl.Callback):
    """Counts waits in the updates of a run, and all others.

    Attributes:
        micro_batches: number of micro-batches.
        updates: waits between the start and the end of a micro-batch, the optimizer step included.
    """

    micro_batches: int = 0
    updates: Counter[str] = field(default_factory=Counter)

    def on_train_batch_start(self, *_: Any) -> None:
        self._before = waits.copy()

    def on_train_batch_end(self, *_: Any) -> None:
        self.micro_batches += 1
        self.updates += waits - self._before


def train(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    folder: Path,
    on_card: bool,
    **settings: Any,
) -> tuple[dict[str, float], Phases]:
    """Train for four optimizer steps; return the last metrics and the waits of the updates."""
    phases = Phases()

    def fit() -> dict[str, float]:
        strategy = OnCard() if on_card else SingleDeviceStrategy("cpu", CPUAccelerator())
        trainer = pl.Trainer(
            max_steps=4,
            strategy=strategy,
            callbacks=[phases, *settings.pop("callbacks", [])],
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            limit_val_batches=1,
            **settings,
        )
        trainer.fit(module, data)
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {n: v for n, v in found.items() if not n.startswith(("time/", "memory/"))}

    if not on_card:
        return fit(), phases
    with pretend_cuda():
        return fit(), phases
