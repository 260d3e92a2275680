"""Sampling with transformers' own model: nothing to install, nothing to sync.

The decode loop is written by hand because ``model.generate`` neither drops finished sequences from
the batch, nor shares a prompt's cache among its group, nor draws each sequence's noise from its own
seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrl_lightning.end_tokens import as_ids, first_end
from kdrl_lightning.errors import require_between
from kdrl_lightning.rollout.decoding import one_token_attention
from kdrl_lightning.rollout.engine import Completion, RolloutEngine, Sampling
from kdrl_lightning.rollout.replica import filled_replica
from kdrl_lightning.weights import ModelWeights


class TransformersEngine(RolloutEngine):
    """Batched sampling with a key-value cache, from the live student.

    Prompts are sorted by length and prefilled once per group; finished sequences leave the batch.

    Ranks decode a different number of steps, which the collectives of a sharded model would not
    survive. From a sharded student it therefore keeps a whole copy on every rank, refreshed at each
    ``update_weights``: as many bytes as the student's weights, beside the shards. Models for which
    that is too much take vLLM.

    Args:
        max_sequences: completions decoded at once.
    """

    def __init__(self, max_sequences: int = 256) -> None:
        require_between("max_sequences", max_sequences, 1, float("inf"))
        self.max_sequences = max_sequences
        self._model: Any = None
        self._replica: Any = None
        self._ends: tuple[int, ...] = ()
        self._pad = 0
        self._rows: int | None = None

    def setup(
        self, weights: ModelWeights, eos_token_id: int | Sequence[int], pad_token_id: int
    ) -> None:
        """Remember the live model."""
        self._model, self._replica = weights.model, None
        self._ends, self._pad = as_ids(eos_token_id), pad_token_id
        self._rows = weights.vocab_size

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Note the version: the live model already has the weights, unless it is sharded."""
        if weights.sharded:
            self._replica = filled_replica(weights, self._replica)
        self._model = self._replica if weights.sharded else weights.model
        self.version = version

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """Sample; see ``RolloutEngine.generate``."""
        out: list[list[Completion]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        # A chunk holds (prompt, its seeds); a group larger than the limit is cut.
        jobs = [
            (i, seeds[i][start : start + self.max_sequences])
            for i in order
            for start in range(0, len(seeds[i]), self.max_sequences)
        ]
        while jobs:
            chunk, size = [], 0
            while jobs and size + len(jobs[0][1]) <= self.max_sequences:
                chunk.append(jobs.pop(0))
                size += len(chunk[-1][1])
            with one_token_attention():
                completions = iter(self._decode([prompts[i] for i, _ in chunk], chunk, sampling))
            for i, own in chunk:
                out[i] += [next(completions) for _ in own]
        return out

    def _decode(
        self, prompts: list[list[int]], chunk: list[tuple[int, list[int]]], sampling: Sampling
    ) -> list[Completion]:
        device = self._model.device
        cache, logits, mask = self._prefill(prompts)
        # Completions that coincide so far share a row of the cache: at first all of a prompt.
        groups = torch.tensor([len(own) for _, own in chunk], device=device)
        rows = torch.arange(len(prompts), device=device).repeat_interleave(groups)
        noise = _uniform_noise([s for _, own in chunk for s in own], sampling.max_tokens).to(device)
        size, ends = len(noise), torch.tensor(self._ends, device=device)
        ids = torch.full((size, sampling.max_tokens), self._pad, device=device)
        logprobs = torch.zeros(size, sampling.max_tokens, device=device, dtype=torch.float32)
        alive = torch.arange(size, device=device)
        done = torch.zeros(size, dtype=torch.bool, device=device)
        for t in range(sampling.max_tokens):
            own = logits[:, : self._rows]
            token, logprob = _draw(own, rows, noise[alive, t], sampling.temperature)
            ids[alive, t], logprobs[alive, t] = token, logprob
            done[alive] = torch.isin(token, ends)
            keep = (~done[alive]).nonzero().squeeze(-1)
            if not len(keep) or t + 1 == sampling.max_tokens:
                break
            alive, vocab = alive[keep], logits.shape[-1]
            paths, rows = (rows[keep] * vocab + token[keep]).unique(return_inverse=True)
            before, token = paths // vocab, paths % vocab
            if len(before) != len(logits) or bool((before.diff() != 1).any()):
                cache.batch_select_indices(before)
                mask = None if mask is None else mask[before]
            position = None
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                position = mask.sum(1, keepdim=True) - 1
            logits = self._model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        return _completions(ids, logprobs, done, self._ends)

    def _prefill(self, prompts: list[list[int]]) -> tuple[Any, Tensor, Any]:
        """Run each prompt once, padded on the left."""
        from kdrl_lightning.caches import growing_cache

        width = max(map(len, prompts))
        rows = [[self._pad] * (width - len(p)) + p for p in prompts]
        ids = torch.tensor(rows, device=self._model.device)
        mask = position = None
        if any(len(p) < width for p in prompts):
            lengths = torch.tensor([len(p) for p in prompts], device=ids.device)
            mask = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
            position = (mask.cumsum(1) - 1).clamp(min=0)
        cache = growing_cache(self._model.config)
        logits = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return cache, logits, mask


def _draw(logits: Tensor, rows: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution of ``rows [N]`` of the logits ``[R, V]`` at ``noise [N]``.

    The most likely token if greedy.
    """
    logits = logits.float()
    if temperature == 0.0:
        token, log_norm = logits.argmax(-1)[rows], logits.logsumexp(-1)
    else:
        logits = logits if temperature == 1.0 else logits / temperature
        peak = logits.amax(-1, keepdim=True)
        # In float64: over 150k tokens a float32 sum would move the edges of rare ones.
        edges = (logits - peak).exp().cumsum(-1, dtype=torch.float64)
        log_norm = (edges[:, -1].log() + peak.squeeze(-1)).float()
        edges = edges[rows]
        token = torch.searchsorted(edges, noise[:, None] * edges[:, -1:], right=True).squeeze(-1)
    return token, logits[rows, token] - log_norm[rows]


def _uniform_noise(seeds: list[int], tokens: int) -> Tensor:
    rows = [np.random.default_rng(seed).random(tokens) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def _completions(
    ids: Tensor, logprobs: Tensor, done: Tensor, ends: tuple[int, ...]
) -> list[Completion]:
    out = []
    rows = zip(ids.tolist(), logprobs.tolist(), done.tolist(), strict=True)
    for row, values, finished in rows:
        end = first_end(row, ends) if finished else len(row)
        out.append(Completion(row[:end], values[:end], truncated=not finished))
    return out
