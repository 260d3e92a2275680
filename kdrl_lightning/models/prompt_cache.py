"""KV caches: one holds shared prompts, with gradient, and one grows without copies.

transformers' dynamic cache copies everything for each sampled token. It also changes while a pass
reads it, so activation checkpointing would recompute that pass with other values.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from kdrl_lightning.common.untyped import HFConfig, HFModel
from kdrl_lightning.models.passes.shared_prompts import MergedRows

# `Any`: the caches of transformers have no types.

# Extra tokens to reserve, in addition to a quarter of the current length: copies stay rare at any
# length, and attention still reads memory that lies close together.
SPARE = 8


class _Layer(DynamicLayer):
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]


class Recording(_Layer):
    """Keeps the keys and values of a pass over prompts; activation checkpointing may repeat it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values, and return them."""
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return 0: no tokens come before the prompts."""
        return 0


class Prefixed(_Layer):
    """Puts a prompt's keys and values before those of each of its rows, and stores nothing new.

    Args:
        prompts: the recorded keys and values of P prompts.
        of: ``[R]``, index of each row's prompt.
    """

    def __init__(self, prompts: Recording, of: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.of = prompts.keys, prompts.values, of
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the prompts' keys and values followed by those of the completions."""
        # We repeat them here, so that in a pass without gradient only one layer's copies exist.
        keys, values = self.keys[self.of], self.values[self.of]
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


class Growing(_Layer):
    """Appends keys and values in place, into reserved memory that it extends when full."""

    def __init__(self) -> None:
        super().__init__()
        self.room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.is_initialized = True
        if self.room is None or self.room[0].shape[-2] < end:
            wide = [
                new.new_empty(*new.shape[:2], end + SPARE + end // 4, new.shape[3])
                for new in (key_states, value_states)
            ]
            if start:
                wide[0][:, :, :start], wide[1][:, :, :start] = self.keys, self.values
            self.room = (wide[0], wide[1])
        self.room[0][:, :, start:end], self.room[1][:, :, start:end] = key_states, value_states
        self.keys, self.values = (part[:, :, :end] for part in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep or repeat the rows ``indices``."""
        if self.room is not None:
            end = self.keys.shape[-2]
            self.room = (self.room[0][indices], self.room[1][indices])
            self.keys, self.values = (part[:, :, :end] for part in self.room)


def growing_cache(config: HFConfig) -> DynamicCache:
    """Return transformers' cache for a model, with ``Growing`` in place of its plain layers."""
    cache = DynamicCache(config=config)
    cache.layers = [Growing() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def select_rows(memory: Any, rows: Tensor) -> Any:
    """Return a model's cache with some rows kept or repeated.

    Args:
        memory: a transformers cache, or a list of tensors ``[B, ...]`` (RWKV); a cache is changed
            in place.
        rows: ``[R]``, indices of the rows.

    Raises:
        TypeError: ``memory`` is neither of them.
    """
    if isinstance(memory, list | tuple) and all(isinstance(part, Tensor) for part in memory):
        return [part[rows] for part in memory]
    if not isinstance(memory, Cache):
        raise TypeError(f"no rows can be chosen from a {type(memory).__name__}")
    if type(memory).batch_select_indices is not Cache.batch_select_indices:
        memory.batch_select_indices(rows)  # the architecture has its own cache class
        return memory
    for layer in memory.layers:
        # Recurrent layers have no ``batch_select_indices``, or inherit one from attention in the
        # same layer that does not change their states.
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.reorder_cache(rows)  # type: ignore[arg-type]
        else:
            cast(Any, layer).batch_select_indices(rows)
    return memory


def shared_states(decoder: HFModel, rows: MergedRows) -> Tensor:
    """Return the hidden states that predict completions, with each prompt run once.

    Args:
        decoder: a transformers decoder with attention in every layer.
        rows: R rows of P prompts.

    Returns:
        ``[R, T, H]``; column t predicts token t of the completion.
    """
    # Prompts are padded on the left, so that completions follow them directly.
    prompts, of = rows.prompts, rows.prompt_of
    width = prompts.shape[1]
    column = torch.arange(width, device=of.device) - width + (prompts >= 0).sum(1, keepdim=True)
    real, position = column >= 0, column.clamp(min=0)
    padding = real.long() if rows.unequal else None
    layers: list[Any] = [Recording() for _ in range(decoder.config.num_hidden_layers)]
    first = decoder(
        input_ids=prompts.gather(1, position).clamp(min=0),
        attention_mask=padding,
        position_ids=position,
        past_key_values=Cache(layers=layers),
        use_cache=True,
    ).last_hidden_state[of, -1:]
    if rows.mask.shape[1] == 1:
        return cast(Tensor, first)
    position = rows.prompt_lengths[:, None] + torch.arange(rows.mask.shape[1] - 1, device=of.device)
    if padding is not None:
        padding = torch.cat([padding[of], torch.ones_like(position)], 1)
    rest = decoder(
        input_ids=rows.input_ids.gather(1, position.clamp(max=rows.input_ids.shape[1] - 1)),
        attention_mask=padding,
        position_ids=position,
        past_key_values=Cache(layers=[Prefixed(x, of) for x in layers]),
        use_cache=True,
    ).last_hidden_state
    states: Tensor = torch.cat([first, rest], 1)
    return states
