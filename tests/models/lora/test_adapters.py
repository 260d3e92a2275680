"""LoRA adapters on a model: what they change, what is exported merged, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from kdrl_lightning import LoRA
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.lora import adapters_off, is_adapter
from kdrl_lightning.models.sharding import load_scorer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.tiny.models import Recipe, save_untrained

IDS = torch.arange(16)[None]


def trained(folder: str, lora: LoRA, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose adapters say something."""
    model = load_scorer(folder, dtype, lora=lora).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.1)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


def plain(folder: str, weights: ModelWeights) -> Any:
    model = load_causal_lm(folder, next(weights.model.parameters()).dtype)
    model.load_state_dict(dict(weights.named_tensors()))
    return model


def test_only_adapters_train_and_the_policy_starts_as_the_base(student_folder: str) -> None:
    scorer = load_scorer(student_folder, torch.float32, lora=LoRA(4))
    base = load_causal_lm(student_folder)
    assert type(scorer.model) is type(base) and not any(m.training for m in scorer.model.modules())
    for name, parameter in scorer.model.named_parameters():
        assert parameter.requires_grad == is_adapter(name), name
    layers = sum(isinstance(m, nn.Linear) for m in base.modules()) - 1  # not the head
    assert len(scorer.state_dict()) == 2 * layers == 14
    assert torch.equal(logits(scorer.model), logits(base))


def test_adapters_follow_from_the_seed_and_leave_the_random_state(student_folder: str) -> None:
    def adapters(seed: int) -> list[Tensor]:
        scorer = load_scorer(student_folder, torch.float32, lora=LoRA(4), seed=seed)
        return [p for n, p in scorer.named_parameters() if ".lora_A." in n]

    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = adapters(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert all(torch.equal(a, b) for a, b in zip(first, adapters(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, adapters(4), strict=True))


@pytest.mark.parametrize("targets", ["all-linear", "q_proj", ["v_proj", "layers.0.mlp.down_proj"]])
def test_what_goes_out_is_an_ordinary_model(student_folder: str, targets: Any) -> None:
    model = trained(student_folder, LoRA(3, 6.0, targets))
    weights = ModelWeights(model, student_folder)
    base = ModelWeights(load_causal_lm(student_folder), student_folder)
    names = [name for name, _ in weights.named_tensors()]
    assert names == [name for name, _ in base.named_tensors()]
    merged = plain(student_folder, weights)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    assert (logits(merged) - logits(base.model)).abs().max() > 1e-2
    assert weights.fingerprint() == ModelWeights(merged, student_folder).fingerprint()
    changed = {
        n.split(".")[-2]
        for (n, a), (_, b) in zip(weights.named_tensors(), base.named_tensors(), strict=True)
        if not torch.equal(a, b)
    }
    wanted = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    asked = {targets} if isinstance(targets, str) else {t.split(".")[-1] for t in targets}
    assert changed == (wanted if targets == "all-linear" else asked)


def test_the_merge_is_done_in_float32(student_folder: str) -> None:
    model = trained(student_folder, LoRA(3, 6.0), torch.bfloat16)
    tensors = dict(ModelWeights(model, student_folder).named_tensors())
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    a, b = (p["default"].weight.detach().float() for p in (layer.lora_A, layer.lora_B))
    expected = (layer.base_layer.weight.float() + 2.0 * (b @ a)).bfloat16()
    assert torch.equal(tensors["model.layers.0.self_attn.q_proj.weight"], expected)


def test_the_trainers_autocast_is_not_the_merges(student_folder: str) -> None:
    weights = ModelWeights(trained(student_folder, LoRA(3, 6.0)), student_folder)
    tensors = dict(weights.named_tensors())
    with torch.autocast("cpu", torch.bfloat16):
        for name, tensor in weights.named_tensors():
            assert torch.equal(tensor, tensors[name]), name


def test_off_is_the_base_and_on_again_behind_an_error(student_folder: str) -> None:
    model = trained(student_folder, LoRA(4))
    on, base = logits(model), logits(load_causal_lm(student_folder))
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), adapters_off(model):
        assert torch.equal(logits(model), base)
        assert [p.requires_grad for p in model.parameters()] == grads
        raise KeyError
    assert torch.equal(logits(model), on) and not torch.equal(on, base)


def test_the_base_is_known_in_any_type_and_with_any_adapters(
    student_folder: str, teacher_folder: str
) -> None:
    def digest(model: Any) -> str:
        return ModelWeights(model, "it").base_digest()

    base = digest(load_causal_lm(student_folder))
    assert digest(trained(student_folder, LoRA(2))) == base
    assert digest(load_causal_lm(student_folder, torch.float64)) == base
    assert digest(load_causal_lm(student_folder, torch.bfloat16)) == base
    assert digest(load_causal_lm(teacher_folder)) != base
    model = load_causal_lm(student_folder)
    with torch.no_grad():
        model.model.norm.weight[3] += 0.1
    assert digest(model) != base


def test_peft_merges_the_same(student_folder: str, tmp_path: Path) -> None:
    from kdrl_lightning.models.lora import adapter_weights, save_adapters

    model = trained(student_folder, LoRA(4, 6.0, ["q_proj", "up_proj"]))
    save_adapters(model, adapter_weights(model), tmp_path, student_folder)
    theirs = PeftModel.from_pretrained(load_causal_lm(student_folder), tmp_path)
    assert torch.equal(logits(theirs), logits(model))
    whole = theirs.merge_and_unload()
    for name, tensor in ModelWeights(model, student_folder).named_tensors():
        torch.testing.assert_close(tensor, whole.get_parameter(name), rtol=0, atol=1e-6)


def test_recomputing_layers_gives_the_same_gradient(student_folder: str) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(0)
        scorer = load_scorer(
            student_folder, torch.float64, activation_checkpointing=recompute, lora=LoRA(4)
        )
        for name, parameter in scorer.named_parameters():
            if is_adapter(name):
                nn.init.normal_(parameter, 0, 0.1)
        mask = torch.ones_like(IDS[:, 1:], dtype=torch.bool)
        scores = scorer(IDS, torch.ones(1, dtype=torch.long), IDS[:, 1:], mask)
        scores.logprobs.sum().backward()
        return [p.grad for p in scorer.parameters() if p.grad is not None]

    whole, again = gradients(False), gradients(True)
    assert len(whole) == 14
    for ours, theirs in zip(whole, again, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, r"`rank` must be at least 1: got 0"),
        ({"alpha": 0.0}, r"`alpha` must be above 0: got 0.0"),
        ({"alpha": float("nan")}, r"`alpha` must be above 0: got nan"),
        ({"dropout": 0.1}, r"`dropout` must be 0 for adapters: got 0.1\..*one policy"),
        ({"target_modules": []}, r"`target_modules` must name a layer: got none"),
        ({"target_modules": ""}, r"`target_modules` must name a layer: got none"),
    ],
)
def test_values_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LoRA(**settings)


@pytest.mark.parametrize("name", ["query", "lm_head", "embed_tokens", "norm", "proj", "mlp"])
def test_what_is_no_linear_layer_below_the_head_is_refused(student_folder: str, name: str) -> None:
    words = (
        rf"`target_modules` must name linear layers below the head .*: got {name}\. Known: down_"
    )
    with pytest.raises(ConfigurationError, match=words):
        load_scorer(student_folder, torch.float32, lora=LoRA(4, target_modules=["q_proj", name]))


def test_an_architecture_without_linear_layers_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ConfigurationError, match=r"got all-linear\. Known: none"):
        LoRA().inject(model, 0)


def test_without_peft_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'kdrl_lightning\[lora\]'"):
        LoRA()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    folder = str(tmp_path / "tied")
    save_untrained(Recipe(width=64, layers=1, steps=1, lr=1e-3, muon=False), Path(folder), seed=0)
    model = load_causal_lm(folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    ours = trained(folder, LoRA(4))
    ModelWeights(ours, folder).save(str(tmp_path / "out"))
    again = load_causal_lm(str(tmp_path / "out"))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(logits(again), logits(ours), rtol=0, atol=1e-5)
