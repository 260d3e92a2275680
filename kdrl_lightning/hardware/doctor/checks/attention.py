"""Checks attention: padded rows, shared prompts, sliding windows, and which kernel runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.findings import Finding, at_most, holds, info
from kdrl_lightning.models.scorer import Scorer

# Mean difference in nats between two ways to run the same rows.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def run(bench: Bench) -> Iterator[Finding]:
    """Check log-probs in float32 and bfloat16, then time shared prompts and name the kernel."""
    for name in ("few-layers", "window"):
        for dtype in BOUNDS:
            scorer = Scorer(bench.load(name, dtype))
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            gap = padding_gap(bench, scorer)
            yield at_most(f"{label}: padded against single rows", gap, BOUNDS[dtype], "nats")
            scorer.verify(name)
            yield info(f"{label}: prompts are shared", "yes" if scorer.shares else "no")
    yield from shared_prompts(bench)
    if bench.on_gpu:
        yield from kernels(bench)


def padding_gap(bench: Bench, scorer: Scorer) -> float:
    """Return the mean difference in nats between scoring rows in one padded batch and alone."""
    rows = [random_ids(bench, length, seed) for seed, length in enumerate((40, 90, 200, 131))]
    prompts = [len(row) // 3 for row in rows]
    together = scorer.chosen(rows, prompts)
    alone = [scorer.chosen([r], [p])[0] for r, p in zip(rows, prompts, strict=True)]
    return (torch.cat(together) - torch.cat(alone)).abs().mean().item()


def shared_prompts(bench: Bench) -> Iterator[Finding]:
    """Compare running a prompt once with running it for each of its completions."""
    prompt, each, group = (1024, 512, 8) if bench.on_gpu else (64, 32, 4)
    scorer = Scorer(bench.load("few-layers"))
    start = random_ids(bench, prompt, 0)
    ids = torch.stack([torch.cat([start, random_ids(bench, each, 1 + i)]) for i in range(group)])
    lengths = torch.full((group,), prompt, device=bench.device)
    mask = torch.ones(group, each, dtype=torch.bool, device=bench.device)

    def work() -> Tensor:
        scorer.zero_grad()
        logprobs: Tensor = scorer(ids, lengths, ids[:, prompt:], mask).logprobs
        logprobs.sum().backward()
        return logprobs.detach()

    scores, times = [], []
    for shares in (False, True):
        scorer.shares = shares
        scores.append(work())
        times.append(bench.seconds(work))
        peak = bench.peak(work)
        memory = "" if peak is None else f", {peak / 2**30:.2f} GiB"
        what = "prompt run once" if shares else "prompt run for each completion"
        yield info(f"{what}: {group} completions", f"{times[-1] * 1e3:.3g} ms{memory}")
    gap = (scores[0] - scores[1]).abs().mean().item()
    yield at_most("shared against plain prompts", gap, BOUNDS[bench.dtype], "nats")


def kernels(bench: Bench) -> Iterator[Finding]:
    """Name the attention kernels that padded rows use, and check that one is a flash kernel."""
    from torch.profiler import ProfilerActivity, profile

    scorer = Scorer(bench.load("few-layers"))
    rows = [random_ids(bench, length, seed) for seed, length in enumerate((500, 900))]
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        scorer.chosen(rows, [100, 200])
        bench.wait()
    names = {event.key for event in trace.key_averages()}
    found = sorted(n for n in names if any(w in n.lower() for w in ("flash", "fmha", "sdpa")))
    yield info("attention kernels", "; ".join(n[:60] for n in found) or "none of a known name")
    flash = any("flash" in name.lower() or "cudnn" in name.lower() for name in found)
    yield holds("padded rows take a flash kernel", flash)


def random_ids(bench: Bench, length: int, seed: int) -> Tensor:
    """Return random token ids ``[length]`` without padding and end tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = bench.shape("few-layers").vocab
    return torch.randint(2, rows, (length,), generator=generator).to(bench.device)
