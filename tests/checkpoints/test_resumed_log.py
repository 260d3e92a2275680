"""A run that stopped in the middle of a rollout logs the numbers of one that never stopped."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import KDRL, RLAD
from kdrl_lightning.callbacks import (
    FSDPCheckpoint,
    KLCoefficientAnnealing,
    SelectiveImitationStats,
    WeightSyncCheck,
)
from kdrl_lightning.metrics import StepStats
from kdrl_lightning.objectives import Objective

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the (completions|groups):UserWarning",
    "ignore:The number of training batches:UserWarning",
)
CLOCKS = ("time/", "memory/", "tokens_per_s")
# Measured once in a rollout, and repeated in the rows of its other steps.
HELD = {"reward/mean", "rollout/length_mean", "rollout/mismatch_kl",
        "rollout/logprob_diff_max", "rollout/staleness", "rollout/padding_frac"}  # fmt: skip


# Lightning's own table keeps it longer than the log.
ONCE = "rollout/once"


class Sometimes(pl.Callback):
    """Measures something at the steps of a list only, as a mean over some tokens may be."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.shown: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.steps[0]:  # stands in the rows of the first rollout alone
            pl_module.log_step({ONCE: 1.0})
        if trainer.global_step in self.steps:
            pl_module._stats._stats.add_sum(
                "kd/sometimes", torch.tensor(float(trainer.global_step))
            )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        shown = trainer.callback_metrics.items()
        kept = {k: float(v) for k, v in shown if not k.startswith((*CLOCKS, "val/", ONCE))}
        self.shown.append(kept)


def run(
    root: Path, models: tuple[str, str], objective: Objective, steps: int, path: Any, **data: Any
) -> tuple[list[dict[str, str]], list[dict[str, float]]]:
    """Fit up to a step; return the rows of its log, and what callbacks saw."""
    logger = CSVLogger(str(root), flush_logs_every_n_steps=1)
    sees = Sometimes([1, 4])
    annealing = (
        [KLCoefficientAnnealing(0.5, 0.1, 0.1, "optimizer_step")]
        if isinstance(objective, KDRL)
        else []
    )
    others = [SelectiveImitationStats(), WeightSyncCheck(), FSDPCheckpoint(str(root / "saved"))]
    trainer = make_trainer(
        root, callbacks=[*annealing, *others, sees], enable_checkpointing=True, logger=logger,
        log_every_n_steps=1, max_steps=steps,
    )  # fmt: skip
    trainer.fit(make_module(*models, objective), datamodule=make_data(**data), ckpt_path=path)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    kept = [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]
    return [row for row in kept if "loss/total" in row], sees.shown


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
@pytest.mark.parametrize(
    ("objective", "data"),
    [
        (KDRL(teacher_kl_coef=0.5), {"epochs_per_rollout": 2}),
        # Old log-probabilities come from the updates; their mismatch only from the first.
        (RLAD(), {"minibatches_per_rollout": 4}),
    ],
    ids=["KDRL", "RLAD"],
)
def test_rows_after_a_resume_are_those_of_an_undisturbed_run(
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    objective: Objective,
    data: dict[str, int],
    stop: int,
) -> None:
    models = student_folder, teacher_folder
    rows, shown = run(tmp_path / "whole", models, objective, 8, None, **data)
    first, _ = run(tmp_path / "parts", models, objective, stop, None, **data)
    path = tmp_path / f"parts/saved/step={stop:08d}.ckpt"
    later, seen = run(tmp_path / "parts", models, objective, 8, str(path), **data)
    assert [HELD - row.keys() for row in rows] == [set()] * 8
    assert [row["kd/sometimes"] for row in rows if "kd/sometimes" in row] == ["1.0", "4.0"]
    assert [ONCE in row for row in rows] == [False] + [True] * 3 + [False] * 4
    assert first + later == rows
    assert seen == shown[stop:]


def test_a_name_leaves_a_gap_after_a_resume_too() -> None:
    whole, resumed = StepStats(), StepStats()
    whole.with_gaps({"kd/a": 1.0, "kd/b": 2.0, "rollout/c": 3.0})
    resumed.load_state_dict(whole.state_dict())
    assert whole.state_dict() == ["kd/a", "kd/b"]
    assert resumed.with_gaps({"kd/b": 4.0}) == {"kd/a": None, "kd/b": 4.0}
