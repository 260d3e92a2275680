"""Checks fsdp2 on one device: loading, checkpoints and resume, a sharded teacher, and LoRA."""

from __future__ import annotations

from collections.abc import Iterator

from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.checks.start import ended
from kdrl_lightning.hardware.doctor.findings import Finding, equal, holds
from kdrl_lightning.hardware.doctor.program import fit

FSDP2 = ("--trainer.strategy=fsdp2", "--trainer.accumulate_grad_batches=2")


def run(bench: Bench) -> Iterator[Finding]:
    """Compare a whole run with a resumed one; train with an offloaded teacher, and with LoRA."""
    flags = (*FSDP2, "--checkpoint.asynchronous=true")
    whole = fit(bench, "whole", *flags, "--trainer.max_steps=4")
    yield from ended("4 steps, clipped and accumulated", whole)
    half = fit(bench, "half", *flags, "--trainer.max_steps=2")
    yield from ended("2 steps, saved while training continues", half)
    rest = fit(bench, "half", *flags, "--trainer.max_steps=4", "--ckpt_path=last")
    yield from ended("2 more steps from the checkpoint", rest)
    if not (whole.code or half.code or rest.code):
        losses = whole.column("loss/total")
        yield equal("losses of the resumed run", rest.column("loss/total")[-2:], losses[-2:])
        yield holds("these losses are not 0", all(losses[-2:]))
    offloaded = fit(
        bench, "offloaded", *FSDP2, "--trainer.max_steps=2", "--model.teacher.offload=true"
    )
    yield from ended("teacher sharded and offloaded", offloaded)
    adapted = fit(
        bench,
        "lora",
        *FSDP2,
        "--trainer.max_steps=2",
        "--model.lora.rank=4",
    )
    yield from ended("LoRA", adapted)
