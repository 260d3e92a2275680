"""Checks that training starts: a few steps from the command line, and two in Python."""

from __future__ import annotations

import os
from collections.abc import Iterator

import lightning.pytorch as pl
import torch

from kdrl_lightning.datamodule import RolloutDataModule
from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.findings import Finding, equal, holds, info
from kdrl_lightning.hardware.doctor.program import Run, fit
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.objectives import KDRL
from kdrl_lightning.rollout.settings import RolloutSettings
from kdrl_lightning.teachers import LocalTeacher
from kdrl_lightning.tiny import ColumnAddition, TinyModel, addition_reward


def run(bench: Bench) -> Iterator[Finding]:
    """Train for a few steps from the command line and in Python."""
    yield info("CPU cores", len(os.sched_getaffinity(0)))
    yield from ended("fit from the command line", fit(bench, "start", "--trainer.max_steps=4"))
    if bench.on_gpu:
        mixed = fit(bench, "mixed", "--trainer.max_steps=4", "--trainer.precision=bf16-mixed")
        yield from ended("the same in bf16-mixed", mixed)
    yield equal("steps of a run in Python, Lightning's defaults", python_run(bench), 2)
    yield holds("inference mode is off afterwards", not torch.is_inference_mode_enabled())


def ended(what: str, run: Run) -> Iterator[Finding]:
    """Yield the exit code of a run that must succeed, and its last line if it failed."""
    yield equal(f"{what}: exit code", run.code, 0)
    if run.code:
        yield info(f"{what}: last line", run.last_line)


def python_run(bench: Bench) -> int:
    """Train two steps through Lightning's ``Trainer`` with its default inference mode."""
    module = KDRLModule(
        student=TinyModel("student"),
        teacher=LocalTeacher(TinyModel("teacher")),
        objective=KDRL(kd_ratio_weight=True),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
    )
    data = RolloutDataModule(
        train_prompts=ColumnAddition(16, seed=1),
        val_prompts=ColumnAddition(8, seed=2),
        reward=addition_reward,
        rollout=RolloutSettings(
            prompts_per_rollout=4, group_size=2, max_tokens=24, minibatches_per_rollout=2
        ),
    )
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="gpu" if bench.on_gpu else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return trainer.global_step
