"""Checks vLLM in the training process: it must change nothing there, and follow the weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Iterator
from typing import Any

import torch

from kdrl_lightning.engines.base import Completion, RolloutEngine, Sampling
from kdrl_lightning.engines.vllm.engine import VLLMEngine
from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.findings import (
    Finding,
    NotReachedError,
    at_least,
    at_most,
    equal,
    holds,
    info,
)
from kdrl_lightning.hardware.machine import PACKAGES, version_of
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.weights import ModelWeights

# `Any`: settings of an engine, by name.

PROMPTS = [[2, 3, 4, 5], [6, 7], [3] * 12]
SEEDS = [[1, 2], [3, 4], [5, 6]]
SAMPLING = Sampling(max_tokens=16)
# Mean difference in nats between engine and trainer.
BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.05}
END = 1


def run(bench: Bench) -> Iterator[Finding]:
    """Start an engine and train in the same process; start a second one, and put one to sleep."""
    if importlib.util.find_spec("vllm") is None:
        raise NotReachedError("vLLM is not installed")
    scorer = Scorer(bench.load("few-layers"))
    weights = ModelWeights(scorer.model, bench.path("few-layers"))
    one_rank(bench)
    before = state(bench)
    engine = started(bench, weights)
    for what, value in state(bench).items():
        yield equal(f"{what} after the start", value, before[what])
    yield info("engine", describe(engine))
    yield from follows_training(bench, engine, scorer, weights)
    same = [engine.generate(PROMPTS, SEEDS, SAMPLING) for _ in range(2)]
    yield holds("the same seeds give the same completions", ids(same[0]) == ids(same[1]))
    yield holds("a prompt that is too long is refused", refuses(engine))
    yield holds("and the engine still samples", bool(engine.generate(PROMPTS, SEEDS, SAMPLING)))
    engine = yield from replaced(bench, engine, weights, enforce_eager=True)
    gap = difference(engine.generate(PROMPTS, SEEDS, SAMPLING), scorer)
    yield at_most("a second engine, without graphs: difference", gap, BOUND[bench.dtype], "nats")
    if bench.on_gpu:
        yield from sleeps(bench, engine, scorer, weights)
    else:
        yield info("sleep", "not reached: it needs a GPU")


def started(bench: Bench, weights: ModelWeights, **settings: Any) -> VLLMEngine:
    """Return a new engine with the student's weights, in at most 30 % of the GPU's memory."""
    engine = VLLMEngine(gpu_memory_utilization=0.3, max_model_len=64, max_sequences=8, **settings)
    engine.setup(weights, END, 0)
    engine.update_weights(weights, 0)
    return engine


def replaced(
    bench: Bench, engine: VLLMEngine, weights: ModelWeights, **settings: Any
) -> Generator[Finding, None, VLLMEngine]:
    """Close an engine and start another in the same process; return the new one."""
    engine.close()
    yield holds("the process group outlives the engine", torch.distributed.is_initialized())
    return started(bench, weights, **settings)


def one_rank(bench: Bench) -> None:
    """Create a process group of this process alone, as a trainer with one rank does."""
    backend, store = "nccl" if bench.on_gpu else "gloo", torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def state(bench: Bench) -> dict[str, object]:
    """Return the settings of this process that an engine must not change, by name."""
    return {
        "matrix product precision": torch.get_float32_matmul_precision(),
        "random state": hash(tuple(torch.get_rng_state().tolist())),
        "threads": torch.get_num_threads(),
        "process group": torch.distributed.is_initialized(),
        "current GPU": torch.cuda.current_device() if bench.on_gpu else "none",
    }


def describe(engine: VLLMEngine) -> str:
    """Return vLLM's version and the class of its model runner."""
    try:
        executor = engine._started().llm_engine.model_executor
        runner = type(executor.driver_worker.worker.model_runner).__name__
    except Exception as error:  # another version keeps it elsewhere
        runner = f"unknown ({type(error).__name__})"
    return f"vLLM {version_of(PACKAGES['vllm'])}, {runner}"


def difference(made: list[list[Completion]], scorer: Scorer) -> float:
    """Return the mean difference in nats between an engine's and the scorer's log-probs."""
    device = scorer.head().weight.device
    pairs = [(p, c) for p, group in zip(PROMPTS, made, strict=True) for c in group]
    rows = [torch.tensor([*p, *c.ids], device=device) for p, c in pairs]
    found = torch.cat(scorer.chosen(rows, [len(p) for p, _ in pairs]))
    theirs = found.new_tensor([value for _, c in pairs for value in c.logprobs])
    return (found - theirs).abs().mean().item()


def follows_training(
    bench: Bench, engine: RolloutEngine, scorer: Scorer, weights: ModelWeights
) -> Iterator[Finding]:
    """Train three steps; the engine must differ before each push, and agree after it."""
    bound = BOUND[bench.dtype]
    gap = difference(engine.generate(PROMPTS, SEEDS, SAMPLING), scorer)
    yield at_most("difference after the first push", gap, bound, "nats")
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-2)
    for step in range(1, 4):
        optimizer.zero_grad()
        row = torch.tensor([2, 3, 4, 5, 6, 7, 8, 9], device=bench.device)
        mask = torch.ones(1, 4, dtype=torch.bool, device=bench.device)
        length = torch.tensor([4], device=bench.device)
        scorer(row[None], length, row[None, 4:], mask).logprobs.sum().neg().backward()
        optimizer.step()
        stale = difference(engine.generate(PROMPTS, SEEDS, SAMPLING), scorer)
        yield at_least(f"step {step}: difference of stale weights", stale, bound, "nats")
        engine.update_weights(weights, step)
        gap = difference(engine.generate(PROMPTS, SEEDS, SAMPLING), scorer)
        yield at_most(f"step {step}: difference after the push", gap, bound, "nats")


def sleeps(
    bench: Bench, engine: VLLMEngine, scorer: Scorer, weights: ModelWeights
) -> Iterator[Finding]:
    """Put an engine to sleep three times; it must free its memory and then sample correctly."""
    engine.close()
    free = torch.cuda.mem_get_info()[0]
    engine = started(bench, weights, sleep=True)
    engine.generate(PROMPTS, SEEDS, SAMPLING)
    for cycle in range(1, 4):
        awake = free - torch.cuda.mem_get_info()[0]
        engine.release()
        asleep = free - torch.cuda.mem_get_info()[0]
        yield at_least(f"sleep {cycle}: memory given back", 1 - asleep / awake, 0.9)
        engine.update_weights(weights, 10 + cycle)
        gap = difference(engine.generate(PROMPTS, SEEDS, SAMPLING), scorer)
        yield at_most(f"sleep {cycle}: difference afterwards", gap, BOUND[bench.dtype], "nats")
    engine.close()


def refuses(engine: VLLMEngine) -> bool:
    """Return whether a prompt beyond the context is refused."""
    try:
        engine.generate([[2] * 100], [[1]], SAMPLING)
    except TrainingStopped:
        return True
    return False


def ids(made: list[list[Completion]]) -> list[list[int]]:
    """Return the token ids of all completions."""
    return [completion.ids for group in made for completion in group]
