"""Plans the engine's memory on a trainer's GPU: while it samples, takes weights, and waits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.engines.cache_budget import CPU_BYTES, SHARE, CacheBudget
from kdrl_lightning.engines.grouped_query_attention import shared_heads_in_place
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.meter import Cost
from kdrl_lightning.hardware.planning.models import plain_model
from kdrl_lightning.hardware.planning.rehearsal import Rehearsal
from kdrl_lightning.models.prompt_cache import SPARE, growing_cache

# `Any`: models and caches of transformers share no typed base.

# Completions that we assume the transformers engine decodes at once if the memory is unknown.
UNBOUNDED = 256
# Numbers of completions with which we count decoding.
DECODED = 2, 4


def copies(run: Rehearsal) -> bool:
    """Return whether the transformers engine samples from a copy of the student."""
    return run.job.sampler.kind == "transformers" and (run.student.sharded or run.job.mixed)


def copy_bytes(run: Rehearsal) -> float:
    """Return the bytes of that copy, in the type that the trainer computes in."""
    return run.whole_copy(2 if run.job.mixed else None)


def awake(run: Rehearsal, memory: float | None) -> dict[str, float]:
    """Return the engine's bytes during updates, by part of the plan.

    Args:
        run: the rehearsal.
        memory: bytes of a device; None if unknown.
    """
    sampler = run.job.sampler
    if sampler.kind == "vllm" and not sampler.sleep:
        return {"engine": engine_bytes(run, memory)}
    return {"engine's copy": copy_bytes(run)} if copies(run) else {}


def sampling(run: Rehearsal, memory: float | None) -> dict[str, float]:
    """Return the bytes held during sampling, without the transformers engine's KV cache.

    Args:
        run: the rehearsal.
        memory: bytes of a device; None if unknown.
    """
    parts: dict[str, float] = dict(run.held)
    if run.job.sampler.kind == "vllm":
        parts["engine"] = engine_bytes(run, memory)
    return parts | (awake(run, memory) if run.job.sampler.kind == "transformers" else {})


def decoding(run: Rehearsal) -> list[float]:
    """Return the transformers engine's bytes to decode each number of completions in ``DECODED``.

    Other engines need none: the list is empty.
    """
    if run.job.sampler.kind != "transformers":
        return []
    return [float(decode(run, rows).peak) for rows in DECODED]


def with_cache(
    parts: dict[str, float], decoded: list[float], config: Any, job: Job, usable: float | None
) -> dict[str, float]:
    """Add the transformers engine's KV cache, for as many completions as it decodes at once.

    Args:
        parts: all other bytes held during sampling, by part of the plan.
        decoded: see ``decoding``; memory is linear in the number of completions.
        config: configuration of the whole student.
        job: settings of the run.
        usable: bytes that tensors can take; None if unknown.
    """
    if not decoded:
        return parts
    slope = (decoded[1] - decoded[0]) / (DECODED[1] - DECODED[0])
    rows = rows_at_once(job, config, usable, sum(parts.values()))
    return parts | {"cache and workspace": decoded[0] + slope * (rows - DECODED[0])}


def pushing(run: Rehearsal) -> dict[str, float]:
    """Return the bytes held while the engine takes weights; of vLLM only its weights count."""
    parts: dict[str, float] = dict(run.held)
    if run.job.sampler.kind == "vllm":
        parts["engine"] = run.whole_copy(engine_itemsize(run))
        parts["push buffers"] = run.push(engine_type(run)).peak
    elif run.job.sampler.kind == "elsewhere":
        parts["push buffers"] = run.push(None).peak
    elif copies(run):
        parts["engine's copy"] = copy_bytes(run)
        parts["push buffers"] = run.push(torch.bfloat16 if run.job.mixed else None).peak
    return parts  # the transformers engine reads nothing if it samples from the student itself


def rows_at_once(job: Job, config: Any, usable: float | None, held: float) -> int:
    """Return how many of the longest completions the transformers engine decodes at once."""
    sampler, vocabulary = job.sampler, int(config.get_text_config().vocab_size)
    every = max(1, job.rows * job.rollout.minibatches_per_rollout)
    if job.on_gpu and usable is None and sampler.max_cached_tokens is None:
        return min(every, sampler.max_sequences or UNBOUNDED)
    free = SHARE * max(0.0, (usable or 0.0) - held) if job.on_gpu else CPU_BYTES
    budget = CacheBudget(sampler.max_cached_tokens, sampler.max_sequences)
    dtype = torch.bfloat16 if job.mixed else torch.float32
    (rows,) = budget.rows_in(free, config, dtype, vocabulary, [job.longest], not job.on_gpu)
    return min(every, rows)


def engine_bytes(run: Rehearsal, memory: float | None) -> float:
    """Return vLLM's bytes while it samples: its part of the GPU, or weights and KV cache."""
    sampler, weights = run.job.sampler, run.whole_copy(engine_itemsize(run))
    if sampler.cache_bytes is not None:
        return weights + sampler.cache_bytes
    if memory is None or not run.job.on_gpu:
        return float(weights + cache_values(run) * engine_itemsize(run) * run.job.longest)
    return sampler.share * memory


def engine_type(run: Rehearsal) -> torch.dtype:
    """Return the type of vLLM's weights and KV cache."""
    auto = torch.bfloat16 if run.job.on_gpu else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return known.get(run.job.sampler.dtype, auto)


def engine_itemsize(run: Rehearsal) -> int:
    """Return the bytes of one number in vLLM's weights and KV cache."""
    return engine_type(run).itemsize


def cache_values(run: Rehearsal, tokens: int = 64) -> float:
    """Return how many numbers a KV cache holds per token of a sequence."""
    cache = _filled(run, whole_model(run), torch.zeros(1, tokens, dtype=torch.long))
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return float(sum(part.numel() for part in parts if part is not None) / tokens)


def whole_model(run: Rehearsal) -> Any:
    """Return the model that an engine of this rank samples from: the student, or a copy."""
    if not (run.student.sharded or run.job.mixed):
        return run.student.model
    return plain_model(run.module, run.job, torch.bfloat16 if run.job.mixed else None)


def decode(run: Rehearsal, rows: int) -> Cost:
    """Count the last decoding step of the transformers engine, for ``rows`` of full length.

    Its KV cache grows by a quarter whenever it is full.
    """
    job, model, meter = run.job, whole_model(run), run.meter
    end = room = 0
    while room < job.longest - 1:
        end = max(room + 1, job.longest_prompt)
        room = end + SPARE + end // 4
    before = meter.restart()
    width = job.longest - 1
    cache = _filled(run, model, torch.zeros(1, end, dtype=torch.long))
    meter.restart()  # leaves out the pass over the prompt, which is a single row here
    cache.batch_select_indices(torch.zeros(rows, dtype=torch.long))
    for layer in cache.layers:
        layer.keys, layer.values = (part[:, :, :width] for part in layer.room)
    # When rows end, the cache is copied layer by layer, so one layer exists twice.
    cache.batch_select_indices(torch.arange(rows))
    ids = torch.zeros(rows, 1, dtype=torch.long)
    # Prompts of different lengths have a mask.
    mask = torch.ones(rows, width + 1, dtype=torch.long)
    attends = nullcontext() if job.on_gpu else shared_heads_in_place(model)
    with torch.no_grad(), run.computing(job.mixed), attends:
        given = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        logits = given.float()
        if job.rollout.temperature != 1.0:
            logits = logits / job.rollout.temperature
        # torch copies what it sums in another type; each completion then gets its row of the sums.
        shares = (logits - logits.amax(-1, keepdim=True)).exp()
        wide = shares.double()
        edges = wide.cumsum(-1)
        del shares, wide
        edges[torch.arange(rows)]
    return Cost(meter.peak - before, flops=meter.flops)


def _filled(run: Rehearsal, model: Any, ids: Tensor) -> Any:
    cache = growing_cache(model.config.get_text_config())
    with torch.no_grad(), run.computing(run.job.mixed):
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
