"""The scorer compares every architecture with its own logits, and refuses what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kdrl_lightning.models.scorer as scoring
from helpers.small_models import build, save
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.architectures.switches import picked_keys, probe_length
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.rollout_batch import RolloutBatch, collate

SHAPES = [(5, 3), (1, 19), (12, 20), (12, 9), (12, 13)]


def rows_and_batch() -> tuple[list[list[int]], RolloutBatch]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 90, (p + c,), generator=draw).tolist() for p, c in SHAPES]
    rows[3][:12] = rows[4][:12] = rows[2][:12]
    prompts = [row[:p] for row, (p, _) in zip(rows, SHAPES, strict=True)]
    completions = [row[p:] for row, (p, _) in zip(rows, SHAPES, strict=True)]
    return rows, collate(prompts, completions, [0, 1, 2, 2, 2], pad_id=0)


@torch.no_grad()
def worst_gap(scorer: Scorer, model: Any) -> float:
    rows, batch = rows_and_batch()
    scores, gaps = scorer.score(batch).logprobs, []
    for row, (prompt, count), found in zip(rows, SHAPES, scores, strict=True):
        logits = model(input_ids=torch.tensor([row])).logits[0, prompt - 1 : -1].log_softmax(-1)
        wanted = logits.gather(-1, torch.tensor(row[prompt:])[:, None]).squeeze(-1)
        gaps.append(float((found[:count] - wanted).abs().max()))
    return max(gaps)


# What needs care: caps under other names, scales, decoders that are none, heads that transform,
# recurrent layers, sparse attention, experts, windows, chunks.
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("recurrent_gemma", {"logits_soft_cap": 2.0}),
        ("xlstm", {"output_logit_soft_cap": 2.0}),
        ("nanochat", {"final_logit_softcapping": 2.0}),
        ("falcon_h1", {"lm_head_multiplier": 0.1}),
        ("hyperclovax", {"logits_scaling": 0.2}),
        ("granitemoehybrid", {"logits_scaling": 4.0}),
        ("inkling_text", {}),
        ("llama4_text", {}),
        ("modernbert-decoder", {}),
        ("roberta", {"is_decoder": True}),
        ("deepseek_v32", {}),
        ("mamba", {}),
        ("qwen3_next", {}),
        ("gpt_oss", {}),
        ("glm4_moe", {}),
        ("lfm2", {}),
        ("gemma3", {}),
    ],
)
def test_scores_are_the_models_own(model_type: str, settings: dict[str, Any]) -> None:
    scorer = Scorer(build(model_type, **settings))
    scorer.verify(model_type)
    assert worst_gap(scorer, scorer.model) < 2e-4


@pytest.mark.parametrize("model_type", ["gemma2", "vaultgemma"])
def test_soft_capped_attention_is_not_left_out(model_type: str) -> None:
    settings = {"attn_logit_softcapping": 0.5, "sliding_window": 64}
    scorer = Scorer(build(model_type, **settings))
    fast, eager = build(model_type, **settings), build(model_type, **settings)
    eager.set_attn_implementation("eager")
    scorer.verify(model_type)
    assert worst_gap(scorer, eager) < 1e-5
    assert worst_gap(scorer, fast) > 1e-2


def test_a_soft_cap_counts_where_it_does_not_show(tmp_path: Path) -> None:
    path = save("gemma2", tmp_path, initializer_range=1e-3)
    assert load_causal_lm(path).config._attn_implementation == "eager"
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(path).eval())
    scorer.verify(path)
    assert scorer.model.config._attn_implementation == "eager"


def test_attention_without_a_cap_stays_fast() -> None:
    scorer = Scorer(build("qwen3"))
    scorer.verify("it")
    assert scorer.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["bert", "xlnet", "cpmant", "reformer"])
def test_models_that_see_later_tokens_are_refused(model_type: str) -> None:
    words = (
        rf"the language model some/{model_type} must not see later tokens: got log-probabilities "
        r"of \w+ that change with the tokens after them\. Use a causal model"
    )
    with pytest.raises(ConfigurationError, match=words):
        Scorer(build(model_type)).verify(f"some/{model_type}")


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {"is_causal": False}), ("gemma3_text", {"use_bidirectional_attention": True})],
)
def test_a_configuration_without_a_causal_mask_is_refused(
    model_type: str, settings: dict[str, bool]
) -> None:
    with pytest.raises(ConfigurationError, match="must not see later tokens"):
        Scorer(build(model_type, **settings)).verify("it")


# As they are before training: a nat of difference between tokens is far away.
@pytest.mark.parametrize("model_type", ["bert", "roberta", "megatron-bert", "xlnet", "roformer"])
def test_a_small_model_that_sees_later_tokens_is_refused(model_type: str) -> None:
    model = build(model_type, initializer_range=0.02)
    assert not getattr(model.config, "is_decoder", False)
    with pytest.raises(ConfigurationError, match="must not see later tokens"):
        Scorer(model).verify("it")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe", "mamba", "gpt_oss"])
def test_a_small_model_that_does_not_is_accepted(model_type: str) -> None:
    scorer = Scorer(build(model_type, initializer_range=0.02))
    scorer.verify("it")
    assert scorer.pads and (scorer.shares or model_type == "mamba")
    assert worst_gap(scorer, scorer.model) < 1e-5


def test_a_head_of_several_streams_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the language-model head of it must be"):
        Scorer(build("prophetnet")).verify("it")


def test_a_soft_cap_of_another_name_is_found_where_logits_are_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "SOFT_CAPS", ())
    model = build("nanochat", final_logit_softcapping=30.0, initializer_range=0.02)
    with pytest.raises(ConfigurationError, match="the language-model head of it must be"):
        Scorer(model).verify("it")


@pytest.mark.parametrize("kind", [TypeError, UnboundLocalError, AssertionError])
def test_a_model_that_cannot_run_is_refused_in_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")

    def fail(*_: Any, **__: Any) -> None:
        raise kind("no such thing\nsecond line")

    monkeypatch.setattr(model, "forward", fail)
    words = r"the language model it must run on token ids alone: got no such thing from Ll"
    with pytest.raises(ConfigurationError, match=words) as caught:
        Scorer(model).verify("it")
    assert "\n" not in str(caught.value)


def leaky(model: Any) -> Any:
    """A decoder whose rows change with the width of the batch."""
    decoder = model.get_decoder()
    forward = decoder.forward

    def padded(*args: Any, input_ids: Any, **kwargs: Any) -> Any:
        out = forward(*args, input_ids=input_ids, **kwargs)
        out.last_hidden_state = out.last_hidden_state * (1 + 0.01 * input_ids.shape[1])
        return out

    decoder.forward = padded
    return model


def test_rows_that_padding_changes_are_run_by_length() -> None:
    scorer = Scorer(leaky(build("llama")))
    scorer.verify("it")
    assert not scorer.pads and not scorer.shares
    assert worst_gap(scorer, scorer.model) < 1e-5
    scorer.pads = True
    assert worst_gap(scorer, scorer.model) > 1e-2


def test_such_a_model_is_not_sharded() -> None:
    scorer = Scorer(leaky(build("llama")))
    scorer.sharded = True
    with pytest.raises(ConfigurationError, match=r"`strategy` must not shard it: got fsdp2, and L"):
        scorer.verify("it")


def test_rows_that_depend_on_each_other_are_refused() -> None:
    model = build("llama")
    decoder = model.get_decoder()
    forward = decoder.forward

    def mixed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(0)
        return out

    decoder.forward = mixed
    words = (
        r"the log-probabilities of it must not depend on other rows of a batch: got some of Llama"
    )
    with pytest.raises(ConfigurationError, match=words):
        Scorer(model).verify("it")


def test_experts_that_became_float64_are_run_one_by_one() -> None:
    scorer = Scorer(build("qwen3_moe").double())
    scorer.verify("it")
    assert scorer.model.config._experts_implementation == "eager"
    assert worst_gap(scorer, scorer.model) < 1e-10


def test_gradients_of_rows_by_length_are_those_of_rows_alone() -> None:
    _, batch = rows_and_batch()
    found = []
    for pads in (True, False):
        scorer = Scorer(build("llama").double())
        scorer.pads = pads
        scorer.score(batch).logprobs.sin().sum().backward()
        found.append({n: p.grad for n, p in scorer.model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "jamba", "qwen3_next"])
def test_recurrent_models_are_accepted_in_16_bits(model_type: str) -> None:
    Scorer(build(model_type).to(torch.bfloat16)).verify(model_type)


def test_the_longest_row_is_past_the_switches_that_can_be_afforded() -> None:
    assert probe_length(build("llama")) == 6
    assert probe_length(build("mistral", sliding_window=100)) == 106
    assert probe_length(build("mistral", sliding_window=5000)) == 6
    # Positions end before.
    assert probe_length(build("mistral", sliding_window=300, max_position_embeddings=302)) == 6
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    switching = build("llama", rope_parameters=dynamic, max_position_embeddings=64)
    assert probe_length(switching, rotary=False) == 6
    assert picked_keys(build("glm_moe_dsa")) == [8] and picked_keys(build("llama")) == []
