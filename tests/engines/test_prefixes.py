"""Sampling without a usual KV cache: log-probabilities equal those of whole rows."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from helpers.allocated import allocated
from helpers.engines import engine_for
from helpers.small_models import build
from kdrl_lightning.engines import Completion, Sampling, TransformersEngine
from kdrl_lightning.engines.prefixes import (
    OwnCachePrefixes,
    PaddedPrefixes,
    Prefixes,
    WholePrefixes,
    is_ordinary,
)
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.prompt_cache import select_rows
from kdrl_lightning.models.weights import ModelWeights

PROMPTS = [[5, 9, 23, 4, 51], [7], [3, 14, 3, 3, 88, 60, 41, 7, 9, 11, 13], [12, 11, 10, 9, 8]]
SEEDS = [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(4)]


@torch.no_grad()
def worst_gap(model: Any, groups: list[list[Completion]]) -> float:
    gaps = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            ids = torch.tensor([prompt + one.ids])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
            gaps.append(float((wanted - torch.tensor(one.logprobs)).abs().max()))
    return max(gaps)


WITH_A_CACHE = ["lfm2", "qwen3_next", "jamba", "granitemoehybrid", "falcon_h1", "mamba", "minimax"]


@pytest.mark.parametrize(
    ("model_type", "way"),
    [
        ("qwen3", PaddedPrefixes),
        ("gpt_oss", PaddedPrefixes),
        ("llama4_text", PaddedPrefixes),
        ("bart", OwnCachePrefixes),  # positions by column: padding would count
        *((name, OwnCachePrefixes) for name in WITH_A_CACHE),
        ("zamba2", WholePrefixes),
        ("rwkv", WholePrefixes),
        ("nemotron_h", WholePrefixes),  # its cache forgets the lower bound on time steps
    ],
)
def test_samples_are_those_of_the_models_own_logits(model_type: str, way: type[Prefixes]) -> None:
    model = build(model_type)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine = engine_for(model)
    slow = [str(w.message) for w in said if "without a cache" in str(w.message)]
    assert len(slow) == (not way.cached)
    assert engine._way is way
    groups = engine.generate(PROMPTS, SEEDS, Sampling(12))
    # Qwen3-Next's delta rule rounds otherwise in chunks than token by token.
    assert worst_gap(model, groups) < (5e-4 if model_type == "qwen3_next" else 1e-4)
    assert len({tuple(one.ids) for group in groups for one in group}) > len(PROMPTS)


def test_a_model_without_a_cache_says_so() -> None:
    words = (
        "TransformersEngine samples RwkvForCausalLM without a cache: every token takes a pass "
        "over all tokens before it. VLLMEngine is faster."
    )
    with pytest.warns(UserWarning, match=words):
        engine_for(build("rwkv"))


def test_each_way_draws_the_same_completions() -> None:
    engine = engine_for(build("qwen3"))
    drawn = []
    for way in (PaddedPrefixes, OwnCachePrefixes, WholePrefixes):
        engine._way = way
        groups = engine.generate(PROMPTS, SEEDS, Sampling(12))
        drawn.append([[one.ids for one in group] for group in groups])
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_model_that_is_never_right_needs_vllm() -> None:
    model = build("llama")
    forward = model.forward

    def noisy(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + torch.randn_like(out.logits)
        return out

    model.forward = noisy
    words = (
        r"`rollout_engine` must be VLLMEngine or VLLMServerEngine for LlamaForCausalLM: got "
        r"TransformersEngine, whose log-probabilities differ from the model's\. Set one of them\."
    )
    with pytest.raises(ConfigurationError, match=words):
        engine_for(model)


def test_sparse_attention_is_sampled_as_far_as_it_attends_to_all() -> None:
    model = build("deepseek_v32", index_topk=40)
    engine = engine_for(model)
    assert worst_gap(model, engine.generate(PROMPTS, SEEDS, Sampling(12))) < 1e-4
    words = r"within 40 tokens, beyond which the choice of keys of DeepseekV32ForCausalLM changes"
    with pytest.raises(ConfigurationError, match=words):
        engine.generate(PROMPTS, SEEDS, Sampling(30))


@pytest.mark.parametrize(
    ("model_type", "ordinary"),
    [("qwen3", True), ("gemma3_text", True), ("bart", False), ("mamba", False), ("lfm2", False)],
)
def test_models_with_rotary_attention_alone_are_ordinary(model_type: str, ordinary: bool) -> None:
    assert is_ordinary(build(model_type)) == ordinary


def test_an_engine_without_weights_pushed_to_it_tries_what_is_not_ordinary() -> None:
    model, engine = build("lfm2"), TransformersEngine()
    engine.setup(ModelWeights(model, "some/model"), 1, 0)
    assert worst_gap(model, engine.generate(PROMPTS, SEEDS, Sampling(12))) < 1e-4


def test_rows_of_a_list_of_states_are_chosen() -> None:
    states = [torch.arange(6).view(3, 2), torch.arange(3)]
    chosen = select_rows(states, torch.tensor([2, 0, 0]))
    assert [part.tolist() for part in chosen] == [[[4, 5], [0, 1], [0, 1]], [2, 0, 0]]


def test_rows_of_what_is_not_known_are_not_chosen() -> None:
    with pytest.raises(TypeError, match="no rows can be chosen from a dict"):
        select_rows({}, torch.tensor([0]))


def test_a_model_that_returns_no_cache_is_not_sampled_with_one() -> None:
    model = build("llama")
    forward = model.forward

    def forgets(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.past_key_values = None
        return out

    model.forward = forgets
    with pytest.raises(TypeError, match="LlamaForCausalLM returns no cache"):
        OwnCachePrefixes(model, 0).start([[3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_make_no_copy_of_a_head_without_gradient(dtype: torch.dtype) -> None:
    # As in the copy that the engine samples from: one per prompt would be 256 heads.
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=4096, hidden_size=64, intermediate_size=64, **sizes)
    model = Qwen2ForCausalLM(config).to(dtype).eval().requires_grad_(False)
    prompts = [[2, 3, 4, i] for i in range(8)]

    @torch.no_grad()
    def start() -> None:
        PaddedPrefixes(model, 0).start(prompts)

    start()
    head = model.lm_head.weight
    assert allocated(start) < head.numel() * head.element_size()
