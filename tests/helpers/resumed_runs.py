"""The pieces that tests share in which a run is stopped at each of its steps and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from helpers.short_runs import Log, Trace, make_data, make_module, make_trainer
from kdrl_lightning import LoRA
from kdrl_lightning.callbacks import FSDPCheckpoint, RunReport, SelectiveImitationStats
from kdrl_lightning.objectives import Objective
from kdrl_lightning.teachers import Teacher

# Values of clocks, and what the report stores by step.
LEFT_OUT = ("time/", "memory/", "tokens_per_s", "val/")


@dataclass
class Setting:
    """Builders of a run's parts; each run gets new objects."""

    student: str
    teacher: str | Teacher
    objective: Callable[[], Objective]
    data: dict[str, Any]
    trainer: dict[str, Any]
    callbacks: Callable[[], list[pl.Callback]] = list
    optimizer: Callable[[Any], Any] | None = None
    lr_scheduler: Callable[[Any], Any] | None = None
    lora: Callable[[], LoRA] | None = None


@dataclass
class Run:
    """The results of a run that are compared."""

    trainer: pl.Trainer
    module: Any
    data: Any
    seen: list[tuple[int, Any]]
    rows: list[dict[str, float]]
    stats: SelectiveImitationStats
    report: RunReport
    callbacks: list[pl.Callback]
    checkpoints: dict[int, str]

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.module.weights().named_tensors()}

    def logged(self) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if not k.startswith(LEFT_OUT)} for row in self.rows]


class Rates(pl.Callback):
    """Keeps the learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.decay: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.decay.append(optimizer.param_groups[0].get("weight_decay", 0.0))


def every_step(saver: FSDPCheckpoint, data: Any) -> None:
    """Make the callback save after every optimizer step."""
    saver.every_n_rollouts = 1 / data.updates_per_rollout  # type: ignore[assignment]


def run(
    folder: Path, setting: Setting, ckpt_path: str | None = None, save: str = "rollouts"
) -> Run:
    """Run to the end, from the start or from a checkpoint; save per step, per rollout or never."""
    lora = None if setting.lora is None else setting.lora()
    module = make_module(setting.student, setting.teacher, setting.objective(), lora=lora)
    module.optimizer_callable = setting.optimizer or module.optimizer_callable
    module.lr_scheduler_callable = setting.lr_scheduler
    data = make_data(**setting.data)
    trace, log = Trace(), Log()
    stats, report = SelectiveImitationStats(), RunReport(evaluate_teacher=False, export=False)
    monitor = "val/accuracy" if data.val_prompts is not None else None
    saver = FSDPCheckpoint(str(folder / "checkpoints"), monitor=monitor, keep_last=1000)
    if save == "steps":
        every_step(saver, data)
    callbacks = [trace, *setting.callbacks(), stats, report, log]
    trainer = make_trainer(
        folder,
        callbacks=callbacks if save == "never" else [*callbacks, saver],
        enable_checkpointing=save != "never",
        **setting.trainer,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    files = {e["step"]: e["path"] for e in saver.entries}
    return Run(trainer, module, data, trace.seen, log.rows, stats, report, callbacks, files)


def same_batches(ours: list[tuple[int, Any]], theirs: list[tuple[int, Any]]) -> None:
    """Check that two runs trained on the same micro-batches, bit for bit."""
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    for (step, a), (_, b) in zip(ours, theirs, strict=True):
        assert (a.temperature, a.totals) == (b.temperature, b.totals), step
        for item in fields(a):
            left, right = getattr(a, item.name), getattr(b, item.name)
            assert isinstance(left, Tensor) == isinstance(right, Tensor), (step, item.name)
            if isinstance(left, Tensor):
                assert left.dtype == right.dtype, (step, item.name)
                assert torch.equal(left, right), (step, item.name)


def same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
