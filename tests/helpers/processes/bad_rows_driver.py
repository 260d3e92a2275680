"""Trains on a source with 1 % bad rows: ``bad_rows_driver.py FOLDER ROWS ROLLOUTS PROMPTS``.

Start it alone, or with ddp by ``torch.distributed.run``. It makes a whole run, and one that is
resumed in the middle. ``FOLDER`` holds the student; the prompts and completions that were drawn go
to ``drawn<ranks>.json`` in it.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from kdrl_lightning import GRPO, KDRLModule, RolloutDataModule, RolloutSettings
from kdrl_lightning.prompts import PromptSource
from kdrl_lightning.prompts.prompt_set import CHECKED_ROWS, sample_rows


class Rows(PromptSource):
    """Rows of which every 100th has no prompt, except those that a run checks before it starts."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.checked = set(sample_rows(count, CHECKED_ROWS, 0))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        bad = index % 100 == 37 and index not in self.checked
        return {"prompt": None if bad else f"{index}=", "answer": "1"}


class Drawn(pl.Callback):
    """Keeps prompts and completions of each rollout, of all ranks, and how many rows were bad."""

    def __init__(self) -> None:
        self.rollouts: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        own = [[j.row["prompt"], j.completion.ids] for j in trainer.datamodule.collector.latest]
        every: list[Any] = [own]
        if trainer.world_size > 1:
            every = [None] * trainer.world_size
            dist.all_gather_object(every, own)
        bad = float(trainer.callback_metrics["rollout/bad_rows"])
        self.rollouts.append([sorted(one for rank in every for one in rank), bad])


def fit(folder: Path, rows: int, rollouts: int, prompts: int, start: str | None) -> list[Any]:
    ranks = int(torch.distributed.is_torchelastic_launched()) + 1
    drawn = Drawn()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=rollouts,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        callbacks=[drawn],
        default_root_dir=folder,
    )
    data = RolloutDataModule(
        Rows(rows),
        lambda sample: len(sample.ids) % 2,
        rollout=RolloutSettings(prompts_per_rollout=prompts, group_size=2, max_tokens=3),
    )
    module: Any = KDRLModule(str(folder / "student"), GRPO(), optimizer=frozen)
    trainer.fit(module, data, ckpt_path=start, weights_only=False)
    if start is None:
        trainer.save_checkpoint(folder / f"after{ranks}-{rollouts}.ckpt")
    return drawn.rollouts


def frozen(parameters: Any) -> torch.optim.Optimizer:
    """Return an optimizer of rate 0, so that rounding on two ranks does not change the samples."""
    return torch.optim.SGD(parameters, lr=0.0)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, *sizes = sys.argv[1:]
    found = draw(Path(folder), *map(int, sizes))
    if not dist.is_initialized() or dist.get_rank() == 0:
        ranks = int(torch.distributed.is_torchelastic_launched()) + 1
        (Path(folder) / f"drawn{ranks}.json").write_text(json.dumps(found))


def draw(folder: Path, rows: int, rollouts: int, prompts: int) -> dict[str, list[Any]]:
    """Return what a whole run draws, and one that is resumed in the middle."""
    ranks = int(torch.distributed.is_torchelastic_launched()) + 1
    whole = fit(folder, rows, rollouts, prompts, None)
    half = rollouts // 2
    first = fit(folder, rows, half, prompts, None)
    second = fit(folder, rows, rollouts, prompts, str(folder / f"after{ranks}-{half}.ckpt"))
    return {"whole": whole, "resumed": first + second}


if __name__ == "__main__":
    main()
