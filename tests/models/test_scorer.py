"""The scorer against ``model(...).logits``, for models that scale, cap or shift their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.scored_models import (
    ARCHITECTURES,
    PAD,
    build,
    reference,
    rollout,
)
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import Head
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.rollout_batch import collate

CASES = [(name, tied) for name in ARCHITECTURES for tied in (True, False)]
every = pytest.mark.parametrize(("name", "tied"), CASES)


@every
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_equal_those_of_the_models_logits(name, tied, temperature):
    model, batch = build(name, tied), rollout(temperature)
    with torch.no_grad():
        scores = Scorer(model).score(batch)
        logprobs, entropy = reference(model, batch)
    assert scores.logprobs.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs, logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropy, entropy, atol=1e-5, rtol=1e-5)


@every
def test_gradients_equal_those_of_the_models_logits(name, tied):
    model, batch = build(name, tied, torch.float64), rollout(0.7)
    generator = torch.Generator().manual_seed(1)
    shape = batch.completion_ids.shape
    weights = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    hidden: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        hidden.append(output.last_hidden_state)

    hook = model.get_decoder().register_forward_hook(keep)

    def gradients(score: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        logprobs, entropy = score()
        masked = batch.completion_mask * weights
        (masked[0] * logprobs + masked[1] * entropy).sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters()}

    def from_logits() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        where = batch.prompt_lengths[:, None] - 1 + torch.arange(shape[1])
        where = where.clamp(max=logits.shape[1] - 1)
        rows = logits[torch.arange(len(batch))[:, None], where]
        shares = (rows / batch.temperature).log_softmax(-1)
        chosen = shares.gather(-1, batch.completion_ids[..., None]).squeeze(-1)
        return chosen, -(shares.exp() * shares).sum(-1)

    ours, theirs = gradients(lambda: Scorer(model).score(batch)[:2]), gradients(from_logits)
    hook.remove()
    exact = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(hidden[0].grad, hidden[1].grad, **exact)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        # Below the head, norms cast gradients to float32 whatever the model's type.
        head = key.startswith("lm_head") and not tied
        bounds = exact if head else {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(ours[key], gradient, **bounds)


@every
def test_verify_accepts(name, tied):
    Scorer(build(name, tied)).verify(name)


@pytest.mark.parametrize(
    "name", ["Gemma2ForCausalLM", "GraniteForCausalLM", "CohereForCausalLM", "PhiForCausalLM"]
)
def test_verify_refuses_a_scorer_that_forgets_a_treatment(name, monkeypatch):
    scorer = Scorer(build(name))
    monkeypatch.setattr(scorer, "head", lambda: Head(scorer.model.get_output_embeddings().weight))
    with pytest.raises(ConfigurationError, match="the language-model head of it must be"):
        scorer.verify("it")


def test_verify_refuses_a_head_that_is_not_known(monkeypatch):
    model = build("LlamaForCausalLM")
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(model, "forward", doubled)
    words = (
        r"the language-model head of some/model must be one that the scorer can compute: got "
        r"log-probabilities [\d.e+-]+ away from the model's. Please report the architecture\."
    )
    with pytest.raises(ConfigurationError, match=words):
        Scorer(model).verify("some/model")


def test_verify_refuses_nan(monkeypatch):
    model = build("LlamaForCausalLM")
    forward = model.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * torch.nan
        return output

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(ConfigurationError, match="got log-probabilities nan away"):
        Scorer(model).verify("some/model")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_verify_accepts_other_precisions(dtype):
    Scorer(build("Qwen2ForCausalLM", dtype=dtype)).verify("qwen")


def test_verify_waits_for_the_weights():
    Scorer(build("LlamaForCausalLM").to("meta")).verify("llama")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_on_the_right_changes_nothing(name):
    batch, scorer = rollout(), Scorer(build(name))
    wider = batch.replace(
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, 6), value=7),
        completion_ids=torch.nn.functional.pad(batch.completion_ids, (0, 6), value=9),
        completion_mask=torch.nn.functional.pad(batch.completion_mask, (0, 6)),
    )
    with torch.no_grad():
        short, long = scorer.score(batch), scorer.score(wider)
    for before, after in zip(short[:2], long[:2], strict=True):
        torch.testing.assert_close(after[:, : before.shape[1]], before, atol=1e-5, rtol=1e-5)
        assert not after[:, before.shape[1] :].any()


def test_what_stands_in_the_padding_changes_nothing():
    batch, scorer = rollout(), Scorer(build("Qwen2ForCausalLM"))
    ids = batch.input_ids.clone()
    ids[torch.arange(ids.shape[1]) >= batch.lengths[:, None]] = 11
    completions = batch.completion_ids.masked_fill(~batch.completion_mask, 12)
    with torch.no_grad():
        before = scorer.score(batch)
        after = scorer.score(batch.replace(input_ids=ids, completion_ids=completions))
    assert torch.equal(before.logprobs, after.logprobs)
    assert torch.equal(before.entropy, after.entropy)


def test_scores_are_zero_behind_the_end():
    batch = rollout()
    with torch.no_grad():
        scores = Scorer(build("Qwen2ForCausalLM")).score(batch)
    behind = ~batch.completion_mask
    assert not scores.logprobs[behind].any()
    assert not scores.entropy[behind].any()
    assert bool((scores.logprobs[batch.completion_mask] < 0).all())


def test_rows_do_not_depend_on_each_other():
    batch, scorer = rollout(), Scorer(build("Qwen2ForCausalLM"))
    with torch.no_grad():
        whole = scorer.score(batch)
        for b in range(len(batch)):
            alone = scorer.score(batch.select([b]))
            width = alone.logprobs.shape[1]
            torch.testing.assert_close(
                alone.logprobs[0], whole.logprobs[b, :width], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "PhiForCausalLM"])
def test_vocab_size_cuts_the_heads_rows(name):
    model, batch = build(name), rollout()
    small = batch.replace(input_ids=batch.input_ids % 20, completion_ids=batch.completion_ids % 20)
    with torch.no_grad():
        scores = Scorer(model, vocab_size=20).score(small)
        logprobs, entropy = reference(model, small, vocab_size=20)
        uncut = Scorer(model).score(small)
    torch.testing.assert_close(scores.logprobs, logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert bool((scores.logprobs >= uncut.logprobs).all())
    Scorer(model, vocab_size=20).verify(name)


def test_forward_returns_no_logits():
    batch = rollout()
    scores = Scorer(build("Qwen2ForCausalLM")).score(batch)
    shapes = [None if t is None else t.shape for t in scores]
    assert shapes == [batch.completion_ids.shape] * 2 + [None] * 6
    assert scores.logprobs.requires_grad and scores.entropy.requires_grad


def test_a_batch_without_completions_has_a_gradient_of_zero():
    batch = collate([[5, 6]], [[]], [0], pad_id=PAD)
    model = build("Qwen2ForCausalLM")
    scores = Scorer(model).score(batch)
    (scores.logprobs.sum() + scores.entropy.sum()).backward()
    assert scores.logprobs.tolist() == [[0.0]]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.lm_head.weight.grad is not None
