"""A ddp run of two processes in which the first one fails while the second waits for it.

``python driver.py FOLDER STUDENT``: the second process writes its number into FOLDER.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.trainer import strategies

FOLDER, STUDENT = Path(), ""  # given on the command line


class FailsFirst(pl.Callback):
    """Raises on the first rank, while the other one waits as in a collective of NCCL."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_rank == 0:
            while not (FOLDER / "waits").exists():
                time.sleep(0.1)
            raise KeyError("someone's callback")
        (FOLDER / "half").write_text(str(os.getpid()))
        (FOLDER / "half").rename(FOLDER / "waits")
        time.sleep(600)


if __name__ == "__main__":
    FOLDER, STUDENT = Path(sys.argv[1]), sys.argv[2]
    strategies.WAITS_S = 2.0
    data = make_data(prompts_per_rollout=4, minibatches_per_rollout=1, val_prompts=None)
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "callbacks": [FailsFirst()]}
    make_trainer(FOLDER, **settings).fit(make_module(STUDENT, None, GRPO()), datamodule=data)
