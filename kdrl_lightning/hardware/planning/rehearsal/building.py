"""Builds a run on fake tensors for a rehearsal: its models, optimizer and process group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import lightning.pytorch as pl
import torch

from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.rehearsal.meter import Meter, without_numbers
from kdrl_lightning.hardware.planning.rehearsal.models import (
    frozen_scorer,
    process_group,
    reference_of,
    second_student,
    student_of,
    work_on_lists,
)
from kdrl_lightning.hardware.planning.rehearsal.steps import Rehearsal
from kdrl_lightning.hardware.planning.teachers.own_prompts import own_prompts_of, tokens_per_token
from kdrl_lightning.hardware.planning.teachers.stand_ins import Stand
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding, local
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.teachers.local import LocalTeacher
from kdrl_lightning.trainer.optimizers import build_optimizer


@contextmanager
def rehearse(module: KDRLModule, job: Job) -> Iterator[Rehearsal]:
    """Build a run on fake tensors, and take a first small step.

    Args:
        module: a module that is not set up; do not use it afterwards.
        job: the other settings.

    Raises:
        ConfigurationError: a model's configuration is missing, or a process group exists already.
    """
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=job.precision,  # type: ignore[arg-type] # a text from the configuration
        accumulate_grad_batches=job.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.trainer = trainer
    shards = process_group(job.ranks) if job.strategy == "fsdp2" else nullcontext()
    with shards as mesh, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixed = torch.bfloat16 if job.mixed else None
        sharding = None if mesh is None else Sharding(mesh, mixed)
        with without_numbers() as meter:
            yield _built(module, job, meter, sharding)


def _built(module: KDRLModule, job: Job, meter: Meter, sharding: Sharding | None) -> Rehearsal:
    held: dict[str, int] = {}
    module.student = student = student_of(module, job, sharding)
    held["student"] = meter.bytes
    share, _ = tokens_per_token(module, job)
    own = own_prompts_of(module, job, share)
    away: list[int] = []

    def frozen(teacher: LocalTeacher) -> Scorer:
        before = meter.bytes
        scorer = frozen_scorer(teacher, job, sharding)
        if teacher.offload and job.on_gpu:  # else it waits where everything else is
            away.append(meter.bytes - before)
        return scorer

    stand = Stand(student, frozen, lambda: second_student(module, job, sharding), share)
    module.frozen.choose(True, reference_of(module, job))
    for name, teacher in (("teacher", module.teacher), ("reference", module.frozen.reference)):
        before, waiting = meter.bytes, sum(away)
        made = None if teacher is None else stand.of(teacher)
        if made is not None:
            held[name] = meter.bytes - before - (sum(away) - waiting)
        setattr(module.frozen, "active" if name == "teacher" else name, made)
    optimizer, _ = build_optimizer(
        list(module.student.parameters()), module.optimizer_callable, None
    )
    if job.on_gpu:
        work_on_lists(optimizer)
    run = Rehearsal(job, module, meter, optimizer, held, sum(away), stand.models, own)
    held["gradients"] = sum(local(p).numel() * p.element_size() for p in run.trained())
    if job.strategy == "ddp":  # a second copy of the gradients, from which it sends them
        held["ddp's buckets"] = held["gradients"]
    # The first pass fills torch's caches, whose tensors are not part of the run's memory.
    run.small_backward()
    run.optimizer.zero_grad()
    before = meter.bytes
    run.step()
    held["moments"] = meter.bytes - before
    return run
