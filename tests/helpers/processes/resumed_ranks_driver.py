"""Lets two ranks resume from different checkpoints: ``resumed_ranks_driver.py FOLDER STRATEGY...``.

It runs under ``torch.distributed.run``, once for all strategies. Rank 0 writes each rank's step or
error message, as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from kdrl_lightning import GRPO, KDRLModule, RolloutDataModule, RolloutSettings
from kdrl_lightning.callbacks import FSDPCheckpoint
from kdrl_lightning.tiny import ColumnAddition


def fit(folder: Path, strategy: str, name: str, path: Path | None = None) -> str:
    """Train and return the step that was reached, or why this rank was refused."""
    saver = FSDPCheckpoint(str(folder / strategy / name), monitor=None, keep_last=9)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=2 if name == "made" else 3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        callbacks=[saver],
        default_root_dir=folder / "runs" / strategy / name,
    )
    module: Any = KDRLModule(str(folder / "student"), GRPO())
    data = RolloutDataModule(
        ColumnAddition(8, seed=1),
        lambda sample: len(sample.ids) % 2,
        rollout=RolloutSettings(prompts_per_rollout=2, group_size=2, max_tokens=4),
    )
    try:
        trainer.fit(module, data, ckpt_path=path, weights_only=False)
    except ValueError as error:
        return str(error)
    return f"step {trainer.global_step}"


def cases(folder: Path, strategy: str) -> dict[str, list[Any]]:
    made = fit(folder, strategy, "made")
    rank = dist.get_rank()
    first, second = (folder / strategy / f"made/step=0000000{step}.ckpt" for step in (1, 2))
    copied = folder / f"{strategy}.copy"
    if rank == 0:
        (shutil.copytree if first.is_dir() else shutil.copy)(first, copied)
    dist.barrier()
    found = {
        "steps": (first, second),
        "none": (None, second),
        "none on the second": (first, None),
        "copied": (first, copied),
        "same": (first, first),
    }
    told = {"made": made, **{k: fit(folder, strategy, k, v[rank]) for k, v in found.items()}}
    every: list[Any] = [None, None]
    dist.all_gather_object(every, told)
    return {name: [own[name] for own in every] for name in told}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, *strategies = sys.argv[1:]
    said = {strategy: cases(Path(folder), strategy) for strategy in strategies}
    if dist.get_rank() == 0:
        (Path(folder) / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
