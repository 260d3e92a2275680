"""Sampling with transformers, without vLLM.

We write the decoding loop ourselves because ``model.generate`` neither drops finished sequences
from the batch, nor shares a prompt's cache within its group, nor draws each sequence's noise from a
separate seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.engines.base import Completion, RolloutEngine, Sampling
from kdrl_lightning.engines.cache_budget import CacheBudget
from kdrl_lightning.engines.grouped_query_attention import shared_heads_in_place
from kdrl_lightning.engines.prefixes import (
    WAYS,
    PaddedPrefixes,
    Prefixes,
    WholePrefixes,
    is_ordinary,
)
from kdrl_lightning.engines.replica import filled_replica
from kdrl_lightning.engines.restriction import restricted
from kdrl_lightning.errors import ConfigurationError, require_count
from kdrl_lightning.models.architectures.rotary import decide_per_row
from kdrl_lightning.models.architectures.switches import changes, may_change, probe_length
from kdrl_lightning.models.architectures.verification import (
    BOUND,
    BOUND_16,
    largest_gap,
    spread_of,
)
from kdrl_lightning.models.end_tokens import as_ids, first_end
from kdrl_lightning.models.loading import load_config, skeleton_causal_lm
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import upload

# `Any`: transformers has no type that all models share.


class TransformersEngine(RolloutEngine):
    """Samples from the live student in batches, with a KV cache.

    The engine sorts prompts by length and runs each prompt once for its whole group; finished
    sequences leave the batch.

    When it first gets weights, the engine compares a few samples with the model's logits. It then
    uses the fastest method that is correct: prompts of mixed lengths with a KV cache, prompts of
    equal length with the architecture's cache (recurrent and hybrid models), or no cache, with a
    warning.

    Ranks decode different numbers of steps, so a sharded model would wait forever in its
    collectives. For a sharded student the engine therefore keeps a full copy on every rank and
    refreshes it at each ``update_weights``. It also keeps one if the trainer computes in 16 bits
    (``bf16-mixed``): then copy and cache are in 16 bits, no step casts a weight, and
    log-probabilities differ from the trainer's by rounding, so objectives apply importance weights.
    The copy takes memory in addition to the student. If that is too much, use vLLM.

    On a GPU use this engine only for first tries; a run warns. By calculation, Qwen3-0.6B takes 6
    to 11 times as long as with vLLM on one H100 (1,024 completions of 2,048 tokens). Nobody has
    measured it yet.

    Args:
        max_sequences: completions decoded at once; None: 256 on a CPU, as many as fit into the
            cache on a GPU.
        max_cached_tokens: tokens of prompts and completions that the cache may hold; None: as many
            as fit into half of a GPU's free memory, or into 4 GiB on a CPU.

    Raises:
        ConfigurationError: a number is below 1.
    """

    def __init__(
        self, max_sequences: int | None = None, max_cached_tokens: int | None = None
    ) -> None:
        limits = {"max_sequences": max_sequences, "max_cached_tokens": max_cached_tokens}
        for name, value in limits.items():
            if value is not None:
                require_count(name, value, 1, float("inf"))
        self.budget = CacheBudget(max_cached_tokens, max_sequences)
        self._model: HFModel = None
        self._replica: Any = None
        self._ends: tuple[int, ...] = ()
        self._pad = 0
        self._rows: int | None = None
        self._way: type[Prefixes] | None = None

    def refused_lengths(self, path: str, max_tokens: int) -> list[tuple[range, str]]:
        """Return the prompt lengths whose completion may cross a length at which the model changes.

        Beyond such a length the model computes earlier tokens differently, see ``Change``, so their
        cached keys and log-probabilities would be wrong.
        """
        if not may_change(load_config(path)):
            return []
        model = skeleton_causal_lm(path)
        return [
            (
                change.crossing(max_tokens),
                f"TransformersEngine cannot sample past {change.limit} tokens, beyond which the "
                f"{change.what} of {type(model).__name__} changes; `max_tokens` {max_tokens}",
            )
            for change in changes(model)
        ]

    def prepare(self, path: str, longest: int, device: torch.device) -> None:
        """Warn on a GPU that vLLM is faster; see ``RolloutEngine.prepare``."""
        if device.type == "cuda":
            warnings.warn(
                "TransformersEngine on a GPU is for first tries: we calculate (no measurement yet) "
                "6 to 11 times the time of VLLMEngine. Add `--config engine/vllm`.",
                stacklevel=2,
            )

    def setup(
        self, weights: ModelWeights, eos_token_id: int | Sequence[int], pad_token_id: int
    ) -> None:
        """Keep a reference to the live model and its end tokens; see ``RolloutEngine.setup``."""
        self._model, self._replica, self._way = weights.model, None, None
        self._ends, self._pad = as_ids(eos_token_id), pad_token_id
        self._rows = weights.vocab_size

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Set the version, and refresh the copy if the model is sharded or computes in 16 bits.

        The live model already has the weights. The first call chooses the sampling method.

        Raises:
            ConfigurationError: no method gives the model's log-probabilities.
        """
        copied = weights.sharded or weights.narrower
        if copied:
            self._replica = filled_replica(weights, self._replica)
        self._model = self._replica if copied else weights.model
        self.exact = type(self).exact and not weights.narrower
        self.version = version
        if self._way is None:
            self._way = self._choose_way()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """Sample completions; see ``RolloutEngine.generate``.

        Raises:
            ConfigurationError: a completion might cross a length at which the model changes.
        """
        refuse_crossing(self._model, [len(p) for p in prompts], sampling.max_tokens)
        if self._way is None:
            self._way = PaddedPrefixes if is_ordinary(self._model) else self._choose_way()
        # A copy already has its compute dtype. Autocast would compute parts of it in float32, which
        # would double the cache.
        autocast = torch.is_autocast_enabled(self._model.device.type) and self._replica is None
        with torch.autocast(self._model.device.type, enabled=autocast):
            return self._sample(self._way, prompts, seeds, sampling)

    def _sample(
        self,
        way: type[Prefixes],
        prompts: Sequence[list[int]],
        seeds: Sequence[list[int]],
        sampling: Sampling,
    ) -> list[list[Completion]]:
        out: list[list[Completion]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        # limits[i]: rows at once if prompt i is the longest, which it is when it joins a chunk.
        lengths = [len(prompt) + sampling.max_tokens for prompt in prompts]
        limits = self.budget.rows(self._model, lengths)
        # A chunk holds pairs of a prompt and its seeds; a group larger than the limit is split.
        jobs = [
            (i, seeds[i][start : start + limits[i]])
            for i in order
            for start in range(0, len(seeds[i]), limits[i])
        ]
        while jobs:
            chunk, size, length = [], 0, len(prompts[jobs[0][0]])
            while (
                jobs
                and size + len(jobs[0][1]) <= limits[jobs[0][0]]
                and (way.mixed or len(prompts[jobs[0][0]]) == length)
            ):
                chunk.append(jobs.pop(0))
                size += len(chunk[-1][1])
            prefixes = way(self._model, self._pad)
            with shared_heads_in_place(self._model):
                completions = iter(
                    self._decode(prefixes, [prompts[i] for i, _ in chunk], chunk, sampling)
                )
            for i, group in chunk:
                out[i] += [next(completions) for _ in group]
        return out

    def _decode(
        self,
        prefixes: Prefixes,
        prompts: list[list[int]],
        chunk: list[tuple[int, list[int]]],
        sampling: Sampling,
    ) -> list[Completion]:
        device = self._model.device
        logits = prefixes.start(prompts)
        # Completions that are equal so far share a cache row: at first, all those of a prompt.
        groups = torch.tensor([len(group) for _, group in chunk])
        rows = torch.arange(len(prompts)).repeat_interleave(groups)
        seeds = [seed for _, group in chunk for seed in group]
        noise = _uniform_noise(seeds, sampling.max_tokens).to(device)
        size, ends = len(noise), torch.tensor(self._ends)
        ids = torch.full((size, sampling.max_tokens), self._pad, device=device)
        logprobs = torch.zeros(size, sampling.max_tokens, device=device, dtype=torch.float32)
        # The host decides which rows continue, so it waits for the GPU once per step, for the
        # tokens.
        alive, done = torch.arange(size), torch.zeros(size, dtype=torch.bool)
        for t in range(sampling.max_tokens):
            used, places = logits[:, : self._rows], upload(alive, device)
            drawn, logprob = _draw(used, upload(rows, device), noise[places, t], sampling)
            ids[places, t], logprobs[places, t] = drawn, logprob
            token = drawn.cpu()
            done[alive] = torch.isin(token, ends)
            keep = (~done[alive]).nonzero().squeeze(-1)
            if not len(keep) or t + 1 == sampling.max_tokens:
                break
            alive, vocab = alive[keep], logits.shape[-1]
            paths, rows = (rows[keep] * vocab + token[keep]).unique(return_inverse=True)
            before, token = paths // vocab, paths % vocab
            moved = len(before) != len(logits) or bool((before.diff() != 1).any())
            source = upload(before, device) if moved else None
            logits = prefixes.step(source, upload(token, device))
        return _completions(ids, logprobs, done, self._ends)

    def _choose_way(self) -> type[Prefixes]:
        """Return the fastest method whose log-probabilities equal those of a full pass per row.

        Raises:
            ConfigurationError: there is none.
        """
        decide_per_row(self._model)
        name = type(self._model).__name__
        for way in WAYS:
            try:
                right = self._samples_right(way)
            except (torch.OutOfMemoryError, ConfigurationError):
                raise
            except Exception:  # each architecture raises a different error for an unknown cache
                continue
            if right and not way.cached:
                warnings.warn(
                    f"TransformersEngine samples {name} without a cache: every token takes a pass "
                    "over all tokens before it. VLLMEngine is faster.",
                    stacklevel=2,
                )
            if right:
                return way
        raise ConfigurationError(
            f"`rollout_engine` must be VLLMEngine or VLLMServerEngine for {name}: got "
            "TransformersEngine, whose log-probabilities differ from the model's. Set one of them."
        )

    def _samples_right(self, way: type[Prefixes]) -> bool:
        """Return whether sampled log-probabilities equal those of single rows up to rounding.

        A cache that leaves out a detail (Nemotron-H's lower bound on time steps) is only slightly
        off. So we compare the gap with rounding alone: the gap of sampling without a cache.
        """
        gap = self._sampling_gap(way)
        if self._model.get_output_embeddings().weight.dtype.itemsize < 4:
            return gap <= BOUND_16
        if gap <= BOUND / 10 or not (way.cached and gap <= BOUND):
            return gap <= BOUND
        return gap <= 20 * self._sampling_gap(WholePrefixes)

    @torch.no_grad()
    def _sampling_gap(self, way: type[Prefixes]) -> float:
        rows = self._model.get_output_embeddings().weight.shape[0]
        end = min(rows, self._rows or rows)
        long = probe_length(self._model, rotary=False) + 5
        prompts = [[(3 + 7 * i) % end for i in range(n)] for n in (long, 5, 5)]
        prompts[2].reverse()
        refuse_crossing(self._model, [long], 6)
        groups = self._sample(way, prompts, [[1, 2], [3, 4, 5], [6]], Sampling(6))
        ours, theirs, whole = [], [], []
        for prompt, completions in zip(prompts, groups, strict=True):
            for one in completions:
                row = torch.tensor([prompt + one.ids], device=self._model.device)
                logits = self._model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
                scores = logits[:, : self._rows].float().log_softmax(-1)
                whole.append(scores)
                theirs.append(scores.gather(-1, row[0, len(prompt) :, None]).squeeze(-1))
                ours.append(scores.new_tensor(one.logprobs))
        kind = self._model.get_output_embeddings().weight.dtype
        return largest_gap(ours, theirs, kind, spread_of(whole))


def refuse_crossing(model: HFModel, prompts: list[int], max_tokens: int) -> None:
    """Refuse completions that might cross a length at which the model changes earlier tokens.

    Args:
        model: the model to sample from.
        prompts: lengths of the prompts, in tokens.
        max_tokens: longest completion, in tokens.

    Raises:
        ConfigurationError: a row might cross such a length.
    """
    for change in changes(model):
        for length in prompts:
            if length in change.crossing(max_tokens):
                raise ConfigurationError(
                    f"`max_tokens` must keep a prompt of {length} tokens and its completion within "
                    f"{change.limit} tokens, beyond which the {change.what} of "
                    f"{type(model).__name__} changes for the whole row: got {max_tokens}. Lower "
                    "it, or shorten the prompts with `max_prompt_tokens`."
                )


def _draw(logits: Tensor, rows: Tensor, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Sample a token for each of N completions by inverting the cumulative distribution.

    At temperature 0 we take the most likely token.

    Args:
        logits: ``[R, V]``, next-token logits of each row.
        rows: ``[N]``, the row of each completion.
        noise: ``[N]``, uniform in [0, 1).
        sampling: temperature, and which tokens are allowed.

    Returns:
        Tokens and their log-probabilities in nats, both ``[N]``.
    """
    logits, temperature = logits.float(), sampling.temperature
    if temperature == 0.0:
        token, log_norm = logits.argmax(-1)[rows], logits.logsumexp(-1)
    else:
        logits = logits if temperature == 1.0 else logits / temperature
        if not sampling.whole:
            logits = restricted(logits, sampling)
        peak = logits.amax(-1, keepdim=True)
        # In float64: a float32 sum over 150k tokens would shift the edges of rare tokens.
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
