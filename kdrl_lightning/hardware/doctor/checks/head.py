"""Checks the lm-head: results against float64, and time and memory by chunk size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.findings import Finding, at_least, at_most, info
from kdrl_lightning.losses.logprobs import Head, auto_chunk_size, token_scores

# Name -> hidden size and vocabulary of Qwen3-0.6B's and Qwen3-8B's head; a small one for a CPU.
ON_GPU = {"0.6B head": (1024, 151_936), "8B head": (4096, 151_936)}
ON_CPU = {"small head": (64, 8_000)}
# Bytes of float32 logits in a chunk.
CHUNKS_GPU = (64 << 20, 256 << 20, 1 << 30, 2 << 30)
CHUNKS_CPU = (1 << 20, 4 << 20, 16 << 20)
# Mean difference of log-probabilities in nats, and least cosine of gradients.
BOUNDS = {torch.float32: (1e-4, 0.99999), torch.bfloat16: (0.02, 0.999)}


def run(bench: Bench) -> Iterator[Finding]:
    """Check the accuracy of each head, then measure chunk sizes."""
    for name, (width, rows) in (ON_GPU if bench.on_gpu else ON_CPU).items():
        for dtype in BOUNDS:
            yield from accuracy(bench, name, width, rows, dtype)
        yield from speed(bench, name, width, rows)


def accuracy(
    bench: Bench, name: str, width: int, rows: int, dtype: torch.dtype
) -> Iterator[Finding]:
    """Compare log-probabilities, entropy and gradients of the chunked head with float64."""
    hidden, weight, ids = inputs(bench, 128, width, rows, dtype)
    scores = token_scores(hidden, Head(weight), ids, 0.9, 48)
    assert scores.entropy is not None
    gradients = torch.autograd.grad((scores.logprobs + scores.entropy).sum(), (hidden, weight))
    exact, heavy = hidden.detach().double(), weight.detach().double()
    exact.requires_grad_()
    heavy.requires_grad_()
    log_p = (exact @ heavy.T / 0.9).log_softmax(-1)
    logprobs, entropy = log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    wanted = torch.autograd.grad((logprobs + entropy).sum(), (exact, heavy))
    bound, cosine = BOUNDS[dtype]
    label = f"{name}, {str(dtype).removeprefix('torch.')}"
    gap = (scores.logprobs - logprobs).abs().mean().item()
    yield at_most(f"{label}: log-probabilities", gap, bound, "nats")
    gap = (scores.entropy - entropy).abs().mean().item()
    yield at_most(f"{label}: entropy", gap, bound, "nats")
    for part, ours, theirs in zip(("states", "weight"), gradients, wanted, strict=True):
        yield at_least(f"{label}: gradient of the {part}, cosine", _cosine(ours, theirs), cosine)


def speed(bench: Bench, name: str, width: int, rows: int) -> Iterator[Finding]:
    """Measure a forward and a backward pass for several chunk sizes."""
    tokens = 4096 if bench.on_gpu else 256
    hidden, weight, ids = inputs(bench, tokens, width, rows, bench.dtype)

    def work(size: int) -> None:
        hidden.grad = weight.grad = None
        token_scores(hidden, Head(weight), ids, 1.0, size).logprobs.sum().backward()

    for limit in CHUNKS_GPU if bench.on_gpu else CHUNKS_CPU:
        size = max(1, limit // (4 * rows))
        us = bench.seconds(lambda size=size: work(size)) / tokens * 1e6  # type: ignore[misc]
        peak = bench.peak(lambda size=size: work(size))  # type: ignore[misc]
        memory = "" if peak is None else f", {peak / 2**30:.2f} GiB"
        yield info(f"{name}: {limit >> 20} MiB of logits at once", f"{us:.3g} µs a token{memory}")
    yield info(f"{name}: rows at once by default", auto_chunk_size(rows))


def inputs(
    bench: Bench, tokens: int, width: int, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random states ``[N, H]`` and weights ``[V, H]`` with gradient, and ids ``[N]``."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(rows, width, generator=generator) * 2 / width**0.5
    ids = torch.randint(rows, (tokens,), generator=generator)
    hidden, weight = (x.to(bench.device, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, ids.to(bench.device)


def _cosine(first: Tensor, second: Tensor) -> float:
    return torch.cosine_similarity(first.flatten().double(), second.flatten(), dim=0).item()
