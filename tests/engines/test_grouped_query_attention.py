"""Attention without copies of shared KV heads: the same numbers, only while a model samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.small_models import build
from kdrl_lightning.engines import Completion, Sampling, TransformersEngine, grouped_query_attention
from kdrl_lightning.engines.grouped_query_attention import (
    attend,
    has_copies_to_save,
    shared_heads_in_place,
)
from kdrl_lightning.models.weights import ModelWeights

PROMPTS = [[5, 9, 23, 4, 51], [7], [3, 14, 3, 3, 88, 60, 41, 7, 9, 11, 13], [12, 11, 10, 9, 8]]
SEEDS = [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(4)]


class Layer(torch.nn.Module):
    """What transformers' function asks of an attention layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def case(groups: int, queries: int = 1, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Queries as a model makes them, keys and values inside of wider room."""
    draw = torch.Generator().manual_seed(groups)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    keys, values = normal(5, 2, 20, 8)[:, :, :13], normal(5, 2, 20, 8)[:, :, :13]
    return [normal(5, queries, 2 * groups, 8).transpose(1, 2), keys, values]


def mask(kind: str, queries: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Left padding of another length in each row."""
    seen = torch.arange(13) >= torch.tensor([0, 3, 12, 1, 5])[:, None]
    seen = seen[:, None, None].expand(-1, -1, queries, -1)
    return {"none": None, "bool": seen, "float": (~seen).to(dtype) * -1e4}[kind]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_what_transformers_gives_bit_by_bit(
    groups: int, queries: int, kind: str, scaling: float | None, dtype: torch.dtype
) -> None:
    args = [*case(groups, queries, dtype), mask(kind, queries, dtype)]
    expected, _ = sdpa_attention_forward(Layer(groups), *args, scaling=scaling)
    got, weights = attend(Layer(groups), *args, scaling=scaling)
    assert torch.equal(got, expected)
    assert weights is None
    assert got.is_contiguous()


def test_a_bias_is_left_to_transformers() -> None:
    args = [*case(3), mask("bool", 1, torch.float64)]
    bias = torch.randn(1, 6, 1, 13, dtype=torch.float64)
    expected, _ = sdpa_attention_forward(Layer(3), *args, position_bias=bias)
    assert torch.equal(attend(Layer(3), *args, position_bias=bias)[0], expected)
    assert not torch.equal(attend(Layer(3), *args)[0], expected)


def drawn(model: Any) -> list[list[Completion]]:
    engine, weights = TransformersEngine(), ModelWeights(model, "some/model")
    engine.setup(weights, 1, 0)
    engine.update_weights(weights, 0)
    return engine.generate(PROMPTS, SEEDS, Sampling(12))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "llama4_text"])
def test_samples_stay_as_they_were_bit_by_bit(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, used = build(model_type), []

    def note(query: torch.Tensor, key: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        used.append((query.shape[1], key.shape[1]))
        return torch.nn.functional.scaled_dot_product_attention(query, key, *args, **settings)

    monkeypatch.setattr(grouped_query_attention, "scaled_dot_product_attention", note)
    ours = drawn(model)
    assert set(used) == {(4, 2)}
    used.clear()
    monkeypatch.setattr(grouped_query_attention, "has_copies_to_save", lambda model: False)
    assert drawn(model) == ours
    assert not used


def test_a_model_has_its_attention_back_afterwards() -> None:
    model, other = build("llama"), build("llama")
    with shared_heads_in_place(model):
        assert model.config._attn_implementation == grouped_query_attention.NAME
        assert other.config._attn_implementation == "sdpa"
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(OSError), shared_heads_in_place(model):
        raise OSError
    assert model.config._attn_implementation == "sdpa"


OTHERS = {
    "gpt_neox": "no heads are shared",
    "lfm2": "some layers are no attention",
    "dbrx": "its configuration has parts",
    "stablelm": "its code has special attention classes",
    "mamba": "no attention",
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_models_keep_their_attention(model_type: str) -> None:
    model = build(model_type)
    before = model.config._attn_implementation
    assert not has_copies_to_save(model)
    with shared_heads_in_place(model):
        assert model.config._attn_implementation == before


def test_sparse_attention_which_reads_the_name_keeps_it() -> None:
    assert has_copies_to_save(build("minimax_m3_vl_text"))
    kinds = ["full_attention", *["minimax_m3_sparse"] * 3]
    assert not has_copies_to_save(build("minimax_m3_vl_text", layer_types=kinds))


def test_eager_attention_and_other_devices_are_left_alone() -> None:
    model = build("llama")
    assert has_copies_to_save(model)
    model.set_attn_implementation("eager")
    assert not has_copies_to_save(model)
    model.set_attn_implementation("sdpa")
    assert not has_copies_to_save(model.to("meta"))
