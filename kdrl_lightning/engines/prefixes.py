"""Next-token logits of rows that grow token by token, with a cache or by running each row again."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.models.prompt_cache import growing_cache, select_rows

# `Any`: models of transformers share no typed base, and their caches have no type.

# Name of the cache in inputs and outputs: of most architectures, of Mamba, and of RWKV.
MEMORIES = ("past_key_values", "cache_params", "state")


class Prefixes(ABC):
    """Runs rows of tokens, each of which grows by one token per step.

    Attributes:
        mixed: whether prompts of different lengths may be in one batch.
        cached: whether a step runs only the new tokens.
    """

    mixed: bool = False
    cached: bool = True

    def __init__(self, model: HFModel, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id

    @abstractmethod
    def start(self, prompts: list[list[int]]) -> Tensor:
        """Run P prompts; return the logits ``[P, V]`` of their next tokens."""

    @abstractmethod
    def step(self, before: Tensor | None, token: Tensor) -> Tensor:
        """Append one token to each row and return the logits ``[R, V]`` of the next tokens.

        Args:
            before: ``[R]``, each row's index in the previous step; None if the rows are the same.
            token: ``[R]``, the new token of each row.
        """


class PaddedPrefixes(Prefixes):
    """Runs prompts padded on the left, with a KV cache that grows in place."""

    mixed = True

    def start(self, prompts: list[list[int]]) -> Tensor:
        """Run each prompt once, padded on the left; return the logits ``[P, V]``."""
        width = max(map(len, prompts))
        rows = [[self.pad_id] * (width - len(p)) + p for p in prompts]
        ids = torch.tensor(rows, device=self.model.device)
        self.mask: Tensor | None = None
        position = None
        if any(len(p) < width for p in prompts):
            lengths = torch.tensor([len(p) for p in prompts], device=ids.device)
            self.mask = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
            position = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache = growing_cache(self.model.config)
        with whole_rows(self.model):
            return self._run(ids, position, logits_to_keep=1)

    def step(self, before: Tensor | None, token: Tensor) -> Tensor:
        """Run only the new tokens; see ``Prefixes.step``."""
        if before is not None:
            self.cache.batch_select_indices(before)
            self.mask = None if self.mask is None else self.mask[before]
        position = None
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
            position = self.mask.sum(1, keepdim=True) - 1
        return self._run(token[:, None], position)

    def _run(self, ids: Tensor, position: Tensor | None, **settings: Any) -> Tensor:
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            **settings,
        ).logits
        return logits[:, -1]


class OwnCachePrefixes(Prefixes):
    """Runs prompts of equal length with the architecture's cache, e.g. recurrent states."""

    def start(self, prompts: list[list[int]]) -> Tensor:
        """Run prompts of equal length; return the logits ``[P, V]``.

        Raises:
            TypeError: the architecture returns no cache.
        """
        ids = torch.tensor(prompts, device=self.model.device)
        out = self.model(input_ids=ids, use_cache=True)
        self.name = next((n for n in MEMORIES if getattr(out, n, None) is not None), "")
        if not self.name:
            raise TypeError(f"{type(self.model).__name__} returns no cache")
        self.memory: Any = getattr(out, self.name)
        logits: Tensor = out.logits
        return logits[:, -1]

    def step(self, before: Tensor | None, token: Tensor) -> Tensor:
        """Run only the new tokens; see ``Prefixes.step``."""
        if before is not None:
            self.memory = select_rows(self.memory, before)
        out = self.model(input_ids=token[:, None], use_cache=True, **{self.name: self.memory})
        self.memory = getattr(out, self.name)
        logits: Tensor = out.logits
        return logits[:, -1]


class WholePrefixes(Prefixes):
    """Runs whole rows at each step, without a cache: time grows with the length squared."""

    cached = False

    def start(self, prompts: list[list[int]]) -> Tensor:
        """Run prompts of equal length; return the logits ``[P, V]``."""
        self.ids = torch.tensor(prompts, device=self.model.device)
        return self._run()

    def step(self, before: Tensor | None, token: Tensor) -> Tensor:
        """Run whole rows; see ``Prefixes.step``."""
        rows = self.ids if before is None else self.ids[before]
        self.ids = torch.cat([rows, token[:, None]], 1)
        return self._run()

    def _run(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.ids, use_cache=False).logits
        return logits[:, -1]


@contextmanager
def whole_rows(model: HFModel) -> Iterator[None]:
    """Pass contiguous hidden states to the head inside the context, which is faster.

    The hidden states of the prompts' last tokens are a slice. If the weight has no gradient, torch
    multiplies a slice row by row, and in 16 bits on a CPU copies the whole weight for each row.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: tuple(rows.contiguous() for rows in given)
    )
    try:
        yield
    finally:
        hook.remove()


WAYS: tuple[type[Prefixes], ...] = (PaddedPrefixes, OwnCachePrefixes, WholePrefixes)


def is_ordinary(model: HFModel) -> bool:
    """Return whether every layer is attention with rotary embeddings.

    ``PaddedPrefixes`` is correct for such a model, without a comparison.
    """
    cache = DynamicCache(config=model.config)
    plain = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in cache.layers)
    rotary = any(name.rpartition(".")[2] == "rotary_emb" for name, _ in model.named_modules())
    takes = inspect.signature(model.forward).parameters
    return plain and rotary and {"past_key_values", "position_ids"} <= takes.keys()
