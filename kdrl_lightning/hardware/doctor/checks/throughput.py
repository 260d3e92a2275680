"""Measures tokens per second: sampling with both engines, and updates of the student."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from kdrl_lightning.engines.base import RolloutEngine, Sampling
from kdrl_lightning.engines.transformers_engine import TransformersEngine
from kdrl_lightning.engines.vllm.engine import VLLMEngine
from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.checks.attention import random_ids
from kdrl_lightning.hardware.doctor.findings import Finding, info
from kdrl_lightning.hardware.planning.cards import CARDS
from kdrl_lightning.losses.logprobs import token_scores
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import recompute_layers
from kdrl_lightning.models.weights import ModelWeights


def run(bench: Bench) -> Iterator[Finding]:
    """Measure updates first, because engines keep GPU memory."""
    prompt, rows = (256, ((8, 2048), (1, 16_384))) if bench.on_gpu else (16, ((4, 64),))
    for count, length in rows:
        yield from updates(bench, count, length)
    scorer = Scorer(bench.load("model"))
    weights = ModelWeights(scorer.model, bench.path("model"))
    tokens = 128 if bench.on_gpu else 16
    for size in (128, 512, 1024) if bench.on_gpu else (4, 16):
        for engine in engines(size, prompt + tokens):
            yield sampling(bench, engine, weights, size, prompt, tokens)


def engines(size: int, context: int) -> Iterator[RolloutEngine]:
    """Yield the installed engines; close each before the next one starts."""
    if size <= 512:  # beyond that, its KV cache takes too much memory
        yield TransformersEngine(max_sequences=size)
    if importlib.util.find_spec("vllm") is not None:
        engine = VLLMEngine(0.4, max_model_len=context, max_sequences=size)
        yield engine
        engine.close()


def sampling(
    bench: Bench, engine: RolloutEngine, weights: ModelWeights, size: int, prompt: int, tokens: int
) -> Finding:
    """Measure how fast an engine samples ``size`` completions of ``tokens`` tokens."""
    engine.setup(weights, (), 0)  # no end token: all completions are equally long
    engine.update_weights(weights, 0)
    prompts = [random_ids(bench, prompt, seed).tolist() for seed in range(size)]
    seeds = [[i] for i in range(size)]
    engine.generate(prompts[:2], seeds[:2], Sampling(4))
    bench.wait()
    began = time.perf_counter()
    engine.generate(prompts, seeds, Sampling(tokens))
    bench.wait()
    speed = size * tokens / (time.perf_counter() - began)
    name = type(engine).__name__
    return info(f"{name}, {size} completions at once", f"{speed:,.0f} tokens a second")


def updates(bench: Bench, count: int, length: int) -> Iterator[Finding]:
    """Measure updates on ``count`` rows of ``length`` tokens; long rows use checkpointing."""
    scorer = Scorer(bench.load("model", torch.float32))
    scorer.train()
    recomputed = length > 4096
    if recomputed:
        recompute_layers(scorer.model)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-6, fused=bench.on_gpu)
    ids = torch.stack([random_ids(bench, length, seed) for seed in range(count)])
    prompt = torch.ones(count, dtype=torch.long, device=bench.device)
    mask = torch.ones(count, length - 1, dtype=torch.bool, device=bench.device)
    mixed = torch.autocast("cuda", torch.bfloat16) if bench.on_gpu else nullcontext()

    def step() -> None:
        with mixed:
            loss: Tensor = scorer(ids, prompt, ids[:, 1:], mask).logprobs.mean().neg()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def head() -> None:
        hidden = torch.randn(count * (length - 1), bench.shape("model").width, device=bench.device)
        hidden = hidden.to(bench.dtype).requires_grad_()
        with mixed:
            scores = token_scores(hidden, scorer.head(), ids[:, 1:].flatten())
        scores.logprobs.mean().backward()
        optimizer.zero_grad()

    whole, part = bench.seconds(step), bench.seconds(head)
    tokens, peak = count * length, bench.peak(step)
    label = f"updates, {count} x {length:,} tokens{', layers recomputed' if recomputed else ''}"
    shape = bench.shape("model")
    weights = sum(p.numel() for p in scorer.parameters())
    attention = shape.layers * shape.heads * shape.head_dim * length
    flops = 6 * (weights + attention) * tokens / whole
    yield info(label, f"{tokens / whole:,.0f} tokens a second")
    yield info(f"{label}: achieved, recomputation not counted", f"{flops / 1e12:.3g} TFLOP/s")
    name = torch.cuda.get_device_name() if bench.on_gpu else "a CPU"
    yield info(f"{label}: part of the GPU's peak (MFU)", utilisation(flops, name))
    yield info(f"{label}: time in the lm-head", f"{part / whole:.0%}")
    if peak is not None:
        yield info(f"{label}: peak above weights", f"{peak / 2**30:.1f} GiB")
    if bench.on_gpu:
        yield info(f"{label}: host synchronisations", synchronisations(step))


def utilisation(flops: float, device: str) -> str:
    """Return which part of a known GPU's bfloat16 peak a step reaches.

    Args:
        flops: floating-point operations per second.
        device: name of the GPU, as its driver gives it.

    >>> utilisation(400e12, "NVIDIA H100 80GB HBM3"), utilisation(1e12, "a CPU")
    ('40 %', 'unknown: no data sheet of a CPU')
    """
    plain = device.replace(" ", "-")
    found = next((card for card in CARDS if card.name.split("-80GB")[0] in plain), None)
    if found is None:
        return f"unknown: no data sheet of {device}"
    return f"{100 * flops / found.flops:.0f} %"


def synchronisations(step: Callable[[], object]) -> int:
    """Return how often a step makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)
