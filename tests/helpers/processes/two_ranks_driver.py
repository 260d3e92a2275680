"""Evaluates and predicts under strategies: ``two_ranks_driver.py FOLDER DEVICES STRATEGY...``.

It runs alone or under ``torch.distributed.run``, once for all strategies.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from kdrl_lightning import GRPO, EvalSet, KDRLModule, RolloutDataModule, RolloutSettings, Sample
from kdrl_lightning.callbacks import PredictionWriter
from kdrl_lightning.tiny import ColumnAddition


def reward(sample: Sample) -> float:
    return len(sample.ids) % 2 + len(sample.text) / 7


def sets() -> dict[str, EvalSet]:
    """Return sets of odd sizes: a rank's last batch is smaller than the other's, or empty."""
    return {
        "seven": EvalSet(
            ColumnAddition(7, seed=2), samples=3, temperature=1.0, batch_size=2, k=[1, 2, 3]
        ),
        "one": EvalSet(ColumnAddition(1, seed=3), samples=2, temperature=1.0),
        "five": EvalSet(ColumnAddition(5, seed=4), batch_size=1),
    }


def run(folder: Path, devices: int, strategy: str, format: str) -> None:
    out = folder / f"{strategy}{devices}"
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        callbacks=[PredictionWriter(format)],  # type: ignore[arg-type]
        default_root_dir=out,
    )
    module: Any = KDRLModule(str(folder / "student"), GRPO())
    data = RolloutDataModule([], reward, val_prompts=sets(), rollout=RolloutSettings(max_tokens=12))
    values: dict[str, Any] = {}
    for stage in (trainer.validate, trainer.test):
        values |= stage(module, datamodule=data, verbose=False)[0]
    trainer.predict(module, datamodule=data, return_predictions=False)
    if trainer.is_global_zero:
        (out / "metrics.json").write_text(json.dumps(values))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, devices, *strategies = sys.argv[1:]
    for strategy, format in zip(strategies, ("jsonl", "parquet"), strict=False):
        run(Path(folder), int(devices), strategy, format)


if __name__ == "__main__":
    main()
