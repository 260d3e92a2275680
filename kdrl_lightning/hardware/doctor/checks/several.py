"""Checks two processes: ddp and fsdp2 with vLLM, SLURM, an error on one rank, NCCL pushes."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

from kdrl_lightning.engines.vllm.server import VLLMServerEngine
from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.checks.engine import (
    BOUND,
    END,
    PROMPTS,
    SAMPLING,
    SEEDS,
    difference,
    follows_training,
)
from kdrl_lightning.hardware.doctor.checks.start import ended
from kdrl_lightning.hardware.doctor.findings import Finding, NotReachedError, at_most, holds, info
from kdrl_lightning.hardware.doctor.program import PATIENCE as STARTS
from kdrl_lightning.hardware.doctor.program import SERVED, Run, fit, served
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.weights import ModelWeights

STEPS = "--trainer.max_steps=2"
# Seconds within which all ranks must end after one has failed.
PATIENCE = 60.0


def run(bench: Bench) -> Iterator[Finding]:
    """Train with two processes; on GPUs, also with an engine on each."""
    if bench.gpus == 1:
        raise NotReachedError("it needs two GPUs")
    for strategy in ("ddp", "fsdp2"):
        made = fit(bench, strategy, STEPS, f"--trainer.strategy={strategy}", devices=2)
        yield from ended(strategy, made)
    yield from one_rank_fails(bench)
    if not bench.on_gpu:
        yield info("engines on several GPUs", "not reached: they need GPUs")
        yield info("weights by NCCL", "not reached: they need two GPUs")
        return
    if importlib.util.find_spec("vllm") is None:
        yield info("engines on several GPUs", "not reached: vLLM is not installed")
        return
    engine = "--config=engine/vllm"
    for strategy in ("ddp", "fsdp2"):
        made = fit(
            bench, f"{strategy}-vllm", engine, STEPS, f"--trainer.strategy={strategy}", devices=2
        )
        yield from ended(f"{strategy} with vLLM", made)
    second = fit(bench, "second", engine, STEPS, "--trainer.devices=[1]")
    yield from ended("vLLM on the second GPU alone", second)
    variables = {
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_NAME": "bash",
    }
    alone = fit(bench, "slurm", engine, STEPS, env=variables)
    yield from ended("vLLM with SLURM's variables", alone)
    yield from by_nccl(bench)


def one_rank_fails(bench: Bench) -> Iterator[Finding]:
    """Train into a folder that rank 0 cannot create; all ranks must end in time."""
    file = bench.folder / "a-file"
    file.touch()
    blocked = file / "runs"
    began = time.perf_counter()
    made = fit(
        bench,
        "blocked",
        STEPS,
        "--trainer.strategy=ddp",
        f"--trainer.default_root_dir={blocked}",
        devices=2,
        limit=PATIENCE * 2,
    )
    seconds = time.perf_counter() - began
    yield at_most("one rank cannot write: seconds until all end", seconds, PATIENCE, "s")
    yield holds(
        "one rank cannot write: the run fails, and names the folder",
        named_as_the_reason(made, blocked),
    )
    yield info("one rank cannot write: last line", made.last_line)


def named_as_the_reason(run: Run, folder: Path) -> bool:
    """Return whether a run failed with an error that names a folder."""
    return run.code != 0 and str(folder) in run.last_line


def by_nccl(bench: Bench) -> Iterator[Finding]:
    """Train, push weights by NCCL to a server on the second GPU, and check each push."""
    scorer = Scorer(bench.load(SERVED))
    weights = ModelWeights(scorer.model, bench.path(SERVED))
    second = {"CUDA_VISIBLE_DEVICES": "1"}
    with served(bench, "engine", "--transfer", "nccl", env=second) as at:
        engine = VLLMServerEngine([at.url], at.key, transfer=True, max_away_s=STARTS)
        engine.setup(weights, END, 0)
        began = time.perf_counter()
        engine.update_weights(weights, 0)
        yield info(
            "first push by NCCL, with its connection", f"{time.perf_counter() - began:.3g} s"
        )
        yield from follows_training(bench, engine, scorer, weights)
        peak = bench.peak(lambda: engine.update_weights(weights, 4))
        began = time.perf_counter()
        engine.update_weights(weights, 5)
        seconds = time.perf_counter() - began
        size = sum(p.numel() * p.element_size() for p in scorer.parameters())
        yield info("push by NCCL", f"{size / seconds / 1e9:.3g} GB/s")
        yield info("push by NCCL: memory on the trainer's GPU", f"{(peak or 0) / 2**30:.2f} GiB")
        gap = difference(engine.generate(PROMPTS, SEEDS, SAMPLING), scorer)
        yield at_most("difference after the last push", gap, BOUND[bench.dtype], "nats")
        yield holds("the engine has the last push's version", engine.version == 5)
