"""A teacher on the device and offloaded, and the log-probabilities of named tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kdrl_lightning.hardware.doctor.attention import random_ids
from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.findings import Finding, at_most, info
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers import LocalTeacher


def run(bench: Bench) -> Iterator[Finding]:
    """Score the same batch with both placements."""
    path, batch = bench.path("few-layers"), scored_batch(bench)
    asked = batch.completion_ids[..., None].expand(-1, -1, 2)
    scores = []
    for offload in (False, True):
        teacher = LocalTeacher(path, offload=offload)
        teacher.check(load_tokenizer(path), path)
        teacher.load(bench.device)
        scores.append(teacher.score(batch, asked))
        seconds = bench.seconds(lambda t=teacher: t.score(batch))  # type: ignore[misc]
        label = "offloaded" if offload else "on the device"
        yield info(f"teacher {label}: {batch.completion_mask.sum()} tokens", f"{seconds:.3g} s")
    here, away = scores
    assert here.topk_logprobs is not None
    gap = (here.logprobs - away.logprobs).abs().max().item()
    yield at_most("offloaded against on the device", gap, 1e-3, "nats")
    gap = (here.topk_logprobs[..., 0] - here.logprobs).abs().max().item()
    yield at_most("named tokens against sampled ones", gap, 1e-3, "nats")


def scored_batch(bench: Bench) -> RolloutBatch:
    """Return four random completions of two prompts."""
    size = 256 if bench.on_gpu else 24
    prompts = [random_ids(bench, size, seed).tolist() for seed in (0, 0, 1, 1)]
    completions = [random_ids(bench, size - 3 * seed, 10 + seed).tolist() for seed in range(4)]
    with torch.device("cpu"):
        batch = collate(prompts, completions, [0, 0, 1, 1], pad_id=0)
    return batch.to(bench.device)
