"""Caches of keys and values: a prompt's with gradient, and one that grows without copies.

transformers' own dynamic cache appends by copying, once per token in sampling, and changes while
it is read, which a recomputed forward pass must not find.
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

from kdrl_lightning.models.shared_prompts import MergedRows

# Room for so many more tokens, and a quarter of those there: copies stay few at any length, and
# what attention reads lies close together.
SPARE = 8


class _Layer(DynamicLayer):
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]


class Recording(_Layer):
    """Keeps the keys and values of one pass over prompts; repeating the pass changes nothing."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note and return them."""
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Nothing comes before the prompts."""
        return 0


class Prefixed(_Layer):
    """Puts a prompt's keys and values in front of those of its rows, and never changes."""

    def __init__(self, prompts: Recording, of: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.of = prompts.keys, prompts.values, of
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return them with those of the completions behind."""
        # Repeated here, so that without gradient one layer's copies exist at a time.
        keys, values = self.keys[self.of], self.values[self.of]
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


class Growing(_Layer):
    """Appends into room that is there, and makes more when it is full."""

    def __init__(self) -> None:
        super().__init__()
        self.room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append."""
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
        """Keep, or repeat, rows."""
        if self.room is not None:
            end = self.keys.shape[-2]
            self.room = (self.room[0][indices], self.room[1][indices])
            self.keys, self.values = (part[:, :, :end] for part in self.room)


def growing_cache(config: Any) -> DynamicCache:
    """Return transformers' cache for a model, with layers that grow in place where it has none."""
    cache = DynamicCache(config=config)
    cache.layers = [Growing() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def select_rows(memory: Any, rows: Tensor) -> Any:
    """Keep, or repeat, rows of what a model remembers of its past tokens.

    Args:
        memory: a transformers cache, or a list of tensors ``[B, ...]`` (RWKV).
        rows: ``[R]``, which rows.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(memory, list | tuple) and all(isinstance(part, Tensor) for part in memory):
        return [part[rows] for part in memory]
    if not isinstance(memory, Cache):
        raise TypeError(f"no rows can be chosen from a {type(memory).__name__}")
    if type(memory).batch_select_indices is not Cache.batch_select_indices:
        memory.batch_select_indices(rows)  # a class of the architecture
        return memory
    for layer in memory.layers:
        # Recurrent layers have no ``batch_select_indices``; where they have one, from attention
        # in the same layer, it leaves their states as they are.
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.reorder_cache(rows)  # type: ignore[arg-type]
        else:
            cast(Any, layer).batch_select_indices(rows)
    return memory


def shared_states(decoder: Any, rows: MergedRows) -> Tensor:
    """Hidden states that predict completions, each prompt run once.

    Args:
        decoder: a transformers decoder with attention in every layer.
        rows: R rows of P prompts.

    Returns:
        ``[R, T, H]``; column t predicts token t of the completion.
    """
    # Padded on the left, so that a completion's tokens come next to its prompt's.
    prompts, of = rows.prompts, rows.prompt_of
    width = prompts.shape[1]
    column = torch.arange(width, device=of.device) - width + (prompts >= 0).sum(1, keepdim=True)
    real, position = column >= 0, column.clamp(min=0)
    padding = None if bool(real.all()) else real.long()
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
