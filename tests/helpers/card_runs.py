"""Short runs on a pretended GPU that count, by phase, what makes the host wait."""

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
    """A strategy that trains on the pretended GPU."""

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
        updates: waits from the end of one micro-batch to the end of the next, including the
            optimizer step, but not those while a rollout is made.
    """

    micro_batches: int = 0
    updates: Counter[str] = field(default_factory=Counter)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, _: int) -> None:
        if batch.metrics:  # the rollout's first: leave out the waits that made the rollout
            self._before = waits.copy()

    def on_train_batch_end(self, *_: Any) -> None:
        self.micro_batches += 1
        self.updates += waits - self._before
        self._before = waits.copy()


def train(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    folder: Path,
    on_card: bool,
    resumes: str | None = None,
    **settings: Any,
) -> tuple[dict[str, float], Phases]:
    """Train for four optimizer steps; return the last metrics and the waits of the updates.

    Args:
        module: the module.
        data: its prompts.
        folder: folder of the run.
        on_card: train on the pretended GPU; else on the CPU.
        resumes: path of a checkpoint to resume from.
        settings: further settings of the trainer.
    """
    phases = Phases()

    def fit() -> dict[str, float]:
        strategy = OnCard() if on_card else SingleDeviceStrategy("cpu", CPUAccelerator())
        trainer = pl.Trainer(
            max_steps=settings.pop("max_steps", 4),
            strategy=strategy,
            callbacks=[*settings.pop("callbacks", []), phases],
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=settings.pop("enable_checkpointing", False),
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            limit_val_batches=1,
            **settings,
        )
        trainer.fit(module, data, ckpt_path=resumes)
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {n: v for n, v in found.items() if not n.startswith(("time/", "memory/"))}

    if not on_card:
        return fit(), phases
    with pretend_cuda():
        return fit(), phases
