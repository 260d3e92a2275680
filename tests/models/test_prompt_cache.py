"""A KV cache that grows in place gives the same values as transformers' cache."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from helpers import scored_models
from kdrl_lightning.models.prompt_cache import SPARE, Growing, growing_cache


def states(rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 2, tokens, 3, generator=generator)
    return keys, values


def test_tokens_are_appended_in_place_while_there_is_room() -> None:
    layer, keys, values = Growing(), *states(2, 400, seed=0)
    addresses = []
    for start, end in [(0, 5), *((t, t + 1) for t in range(5, 400))]:
        got = layer.update(keys[:, :, start:end], values[:, :, start:end])
        assert torch.equal(got[0], keys[:, :, :end]) and torch.equal(got[1], values[:, :, :end])
        assert layer.get_seq_length() == end
        addresses.append((got[0].data_ptr(), got[1].data_ptr()))
    # The prompt comes with room for SPARE + 1 more; the token after them makes new room.
    assert len(set(addresses[: SPARE + 2])) == 1
    assert addresses[SPARE + 1] != addresses[SPARE + 2]
    # A quarter more each time: few copies for many tokens.
    assert len({a for a, b in pairwise(addresses) if a != b}) <= 12


def test_more_than_there_is_room_for_may_come_at_once() -> None:
    layer, keys, values = Growing(), *states(1, 3 * SPARE, seed=1)
    layer.update(keys[:, :, :1], values[:, :, :1])
    got = layer.update(keys[:, :, 1:], values[:, :, 1:])
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)


def test_rows_are_kept_and_repeated_and_go_their_own_ways() -> None:
    layer, keys, values = Growing(), *states(3, 4, seed=2)
    layer.batch_select_indices(torch.tensor([0]))  # nothing is there yet
    layer.update(keys, values)
    rows = torch.tensor([2, 0, 0])
    layer.batch_select_indices(rows)
    assert torch.equal(layer.keys, keys[rows]) and torch.equal(layer.values, values[rows])
    more = states(3, 1, seed=3)
    got = layer.update(*more)
    assert torch.equal(got[0], torch.cat([keys[rows], more[0]], 2))
    assert torch.equal(got[1], torch.cat([values[rows], more[1]], 2))


@torch.no_grad()
def decode(model: Any, cache: DynamicCache, ids: Tensor, prompt: int) -> Tensor:
    """Logits of each step; on the way rows are dropped, repeated and put in another order."""
    chosen = {10: [0, 0, 2], 40: [2, 1], 75: [1, 0, 1]}
    logits = [model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True).logits[:, -1]]
    for t in range(prompt, ids.shape[1]):
        if t in chosen:
            ids = ids[chosen[t]]
            cache.batch_select_indices(torch.tensor(chosen[t]))
        step = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        logits.append(step.logits[:, -1])
    return torch.cat(logits)


# Gemma 2's layers take turns: one sees a window, the next all.
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("LlamaForCausalLM", [Growing, Growing]),
        ("Gemma2ForCausalLM", [DynamicSlidingWindowLayer, Growing]),
    ],
)
def test_a_decode_is_that_of_transformers_own_cache(name: str, kinds: list[type]) -> None:
    model = scored_models.build(name, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(2, scored_models.VOCAB, (3, 90), generator=generator)
    own, theirs = growing_cache(model.config), DynamicCache(config=model.config)
    assert [type(layer) for layer in own.layers] == kinds
    found, expected = decode(model, own, ids, 6), decode(model, theirs, ids, 6)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(own.layers, theirs.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.values, b.values, rtol=1e-10, atol=1e-10)
