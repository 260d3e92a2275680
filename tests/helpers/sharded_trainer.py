"""A stand-in for a trainer whose strategy shards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from kdrl_lightning.checkpoints.writer import CheckpointWriter


def sharded_trainer(step: int = 4, state: Any = None) -> Any:
    """Return what ``CheckpointWriter`` reads of a trainer with one rank and a sharded strategy."""
    state = state or {
        "loops": {},
        "global_step": step,
        "state_dict": {"student.model.w": torch.arange(6.0).reshape(2, 3) + step},
        "optimizer_states": [{"moments": torch.ones(3), "settings": {"lr": 0.1, "name": "w"}}],
    }
    return SimpleNamespace(
        strategy=ModelParallelStrategy(),
        is_global_zero=True,
        global_step=step,
        lightning_module=SimpleNamespace(reduce=lambda value, operation: value),
        _checkpoint_connector=SimpleNamespace(dump_checkpoint=lambda weights_only: state),
    )


def as_shards(path: str, folder: Path) -> str:
    """Write what a checkpoint file holds as a folder of shards; return the folder."""
    state = torch.load(path, weights_only=True)
    CheckpointWriter().write(sharded_trainer(state["global_step"], state), folder)
    return str(folder)
