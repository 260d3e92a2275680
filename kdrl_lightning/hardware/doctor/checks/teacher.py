"""Checks a teacher on the device, offloaded and served, also its log-probs of given tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.checks.attention import random_ids
from kdrl_lightning.hardware.doctor.checks.engine import BOUND
from kdrl_lightning.hardware.doctor.findings import Finding, at_most, info
from kdrl_lightning.hardware.doctor.program import PATIENCE, SERVED, served
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers import LocalTeacher, ServerTeacher


def run(bench: Bench) -> Iterator[Finding]:
    """Score the same batch with local teachers, and with a served one."""
    yield from placements(bench)
    if importlib.util.find_spec("vllm") is None:
        yield info("served teacher", "not reached: vLLM is not installed")
        return
    yield from as_teacher(bench)


def placements(bench: Bench) -> Iterator[Finding]:
    """Compare a teacher on the device with an offloaded one."""
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
    yield at_most("sampled tokens scored as given ones", gap, 1e-3, "nats")


def scored_batch(bench: Bench) -> RolloutBatch:
    """Return four random completions of two prompts."""
    size = 256 if bench.on_gpu else 24
    prompts = [random_ids(bench, size, seed).tolist() for seed in (0, 0, 1, 1)]
    completions = [random_ids(bench, size - 3 * seed, 10 + seed).tolist() for seed in range(4)]
    with torch.device("cpu"):
        batch = collate(prompts, completions, [0, 0, 1, 1], pad_id=0)
    return batch.to(bench.device)


def as_teacher(bench: Bench) -> Iterator[Finding]:
    """Compare a served teacher with the same one in this process."""
    path, batch = bench.path(SERVED), scored_batch(bench)
    asked = batch.completion_ids[..., None]
    local = LocalTeacher(path)
    with served(bench, "teacher", "--teacher") as at:
        remote = ServerTeacher(path, [at.url], at.key, max_away_s=PATIENCE)
        scores = []
        for teacher in (local, remote):
            teacher.check(load_tokenizer(path), path)
            teacher.load(bench.device)
            scores.append(teacher.score(batch, asked))
        seconds = bench.seconds(lambda: remote.score(batch))
    here, there = scores
    mask, bound = batch.completion_mask, BOUND[bench.dtype]
    gap = (here.logprobs - there.logprobs)[mask].abs().mean().item()
    yield at_most("served teacher against a local one", gap, bound, "nats")
    assert there.topk_logprobs is not None
    gap = (there.topk_logprobs[..., 0] - there.logprobs)[mask].abs().mean().item()
    yield at_most("served teacher: sampled tokens scored as given ones", gap, bound, "nats")
    yield info(f"served teacher: {mask.sum()} tokens", f"{seconds:.3g} s")
