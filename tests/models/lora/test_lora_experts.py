"""Adapters on experts and on the text part of multimodal models: merged weights are equal."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers.moe_models import MODELS, build, logprobs
from kdrl_lightning import LoRA
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.lora import adapted_layers, adapters_off, is_adapter
from kdrl_lightning.models.sharding import recompute_layers
from kdrl_lightning.models.weights import ModelWeights, plain_name

IDS = torch.stack([torch.arange(6, 30), torch.arange(29, 5, -1)])
FUSED = sorted(MODELS.keys() - {"gemma3", "mamba", "dbrx"})


def adapted(name: str, lora: LoRA | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A model whose adapters say something."""
    model = build(name, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`target_modules: all-linear` leaves")
        (lora or LoRA(3, 6.0)).inject(model, 0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_adapter(key):
                nn.init.normal_(parameter, 0, 0.1, torch.Generator().manual_seed(len(key)))
    return model


def names(model: Any) -> set[str]:
    """Which weights have an adapter, by the ends of their names."""
    plain = [plain_name(name).removesuffix(".weight").split(".") for name in adapted_layers(model)]
    return {".".join(p[-2:] if p[-2] == "experts" else p[-1:]) for p in plain}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_plain_model_with_the_merged_weights_is_the_adapted_model(name: str) -> None:
    model, base = adapted(name), build(name)
    tensors = dict(ModelWeights(model, "it").named_tensors())
    assert tensors.keys() == dict(base.named_parameters(remove_duplicate=False)).keys()
    ours = logprobs(model, IDS)
    assert (ours - logprobs(base, IDS)).abs().max() > 0.1
    merged = copy.deepcopy(base)
    merged.load_state_dict(tensors, strict=False)  # buffers are the base's
    torch.testing.assert_close(logprobs(merged, IDS), ours, rtol=0, atol=1e-10)
    with adapters_off(model):
        assert torch.equal(logprobs(model, IDS), logprobs(base, IDS))
    torch.testing.assert_close(logprobs(model, IDS), ours, rtol=0, atol=0)  # no weight was changed


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_adapter_gets_a_gradient_and_no_base_weight_does(name: str) -> None:
    model = adapted(name)
    model(input_ids=IDS).logits.log_softmax(-1).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter(key), key
        assert not is_adapter(key) or bool(parameter.grad.any()), key


@pytest.mark.parametrize("name", ["glm4_moe", "gpt_oss"])
def test_recomputed_layers_give_the_same_gradient(name: str) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        model = adapted(name)
        if recompute:
            recompute_layers(model)
        model(input_ids=IDS, use_cache=False).logits.log_softmax(-1).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for ours, theirs in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUSED)
def test_all_linear_takes_the_experts_and_leaves_router_and_head(name: str) -> None:
    found = names(adapted(name))
    assert {"experts.gate_up_proj", "experts.down_proj"} <= found
    assert not {"gate", "router", "shared_expert_gate", "lm_head", "dt_proj"} & found


@pytest.mark.parametrize("name", FUSED)
def test_a_saved_folder_holds_the_adapted_experts(name: str, tmp_path: Path) -> None:
    model = adapted(name, dtype=torch.float32)
    ModelWeights(model, "it").save(str(tmp_path))
    merged = load_causal_lm(str(tmp_path), torch.float32)
    torch.testing.assert_close(logprobs(merged, IDS), logprobs(model, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_peft_reads_the_adapter(name: str, tmp_path: Path) -> None:
    from kdrl_lightning.models.lora import adapter_weights, save_adapters

    model = adapted(name)
    save_adapters(model, adapter_weights(model), tmp_path, "base")
    theirs = PeftModel.from_pretrained(build(name), str(tmp_path)).eval()
    torch.testing.assert_close(logprobs(theirs, IDS), logprobs(model, IDS), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gpt_oss", "glm4_moe"])
def test_a_pass_does_not_change_what_tells_the_base(name: str) -> None:
    """peft changes the order of a module's weights; engines read them in one order."""
    base, model = build(name), adapted(name)
    digest = ModelWeights(base, "it").base_digest()
    logprobs(model, IDS)
    assert ModelWeights(model, "it").base_digest() == digest
    names = [key for key, _ in ModelWeights(base, "it").named_tensors()]
    assert [key for key, _ in ModelWeights(model, "it").named_tensors()] == names


def test_experts_alone_of_bfloat16_are_merged_in_float32() -> None:
    model = adapted("gpt_oss", LoRA(3, 6.0, ["down_proj"]), torch.bfloat16)
    name = "model.layers.0.mlp.experts.base_layer.down_proj"
    layer = adapted_layers(model)[name]
    a, b = (p["default"].weight.float() for p in (layer.lora_A, layer.lora_B))
    weight = model.get_parameter(name)
    expected = [
        weight[e].float() + 2.0 * (b.view(32, 3, 4)[..., e] @ a.view(4, 3, 24)[e]).T
        for e in range(4)
    ]
    merged = dict(ModelWeights(model, "it").named_tensors())[plain_name(name)]
    assert torch.equal(merged, torch.stack(expected).bfloat16())


@pytest.mark.parametrize(
    ("name", "targets", "found"),
    [
        ("qwen3_moe", ["q_proj", "experts.down_proj"], {"q_proj", "experts.down_proj"}),
        ("qwen3_moe", ["gate_proj", "up_proj"], {"experts.gate_up_proj"}),
        ("mixtral", ["w1", "w3", "w2"], {"experts.gate_up_proj", "experts.down_proj"}),
        ("glm4_moe", ["gate_proj", "up_proj"], {"gate_proj", "up_proj", "experts.gate_up_proj"}),
        ("glm4_moe", ["down_proj"], {"down_proj", "experts.down_proj"}),
        ("glm4_moe", ["mlp.down_proj"], {"down_proj"}),
        ("gemma3", ["q_proj"], {"q_proj"}),
        ("jamba", ["router"], {"router"}),
    ],
)
def test_names_stand_for_layers_and_experts(name: str, targets: list[str], found: set[str]) -> None:
    model = adapted(name, LoRA(2, target_modules=targets))
    assert names(model) == found
    assert not any("vision" in weight for weight in adapted_layers(model))
    base = build(name)
    base.load_state_dict(dict(ModelWeights(model, "it").named_tensors()), strict=False)
    torch.testing.assert_close(logprobs(base, IDS), logprobs(model, IDS), rtol=0, atol=1e-10)


def test_a_vision_tower_inside_the_decoder_is_left_alone() -> None:
    model = build("gemma3")
    model.model.language_model.tower = model.model.vision_tower
    model.model.vision_tower = None
    LoRA(2).inject(model, 0)
    assert len(adapted_layers(model)) == 14
    assert not any("tower" in name for name in adapted_layers(model))


def test_a_vision_tower_is_left_alone() -> None:
    weights = adapted_layers(adapted("gemma3"))
    assert len(weights) == 14 and all("language_model" in name for name in weights)


@pytest.mark.parametrize(
    ("name", "lora", "words"),
    [
        ("gemma3", LoRA(2, target_modules=["fc1"]), r"in its text decoder: got fc1\. Known: down_"),
        ("qwen3_moe", LoRA(2, target_modules=["gate"]), r"got gate\. Known: .*gate_up_proj"),
        ("phimoe", LoRA(2, target_modules=["router"]), r"got router\. Known: "),
        ("qwen3_moe", LoRA(2, target_modules=["experts"]), r"got experts\. Known: "),
        ("qwen3_moe", LoRA(2, target_modules=["gate_proj"]),
         r"must name both gate_proj and up_proj .*: got only gate_proj\. Add up_proj"),
        ("mixtral", LoRA(2, target_modules=["w3"]), r"must name both w3 and w1 .*got only w3"),
        ("mamba", LoRA(2, target_modules=["in_proj", "out_proj"]),
         r"be layers whose output MambaForCausalLM uses: got out_proj, whose weights it reads d"),
        ("jamba", LoRA(2, target_modules=["dt_proj"]), r"uses: got dt_proj, whose weights"),
        ("qwen3_moe", LoRA(33), r"`rank` must be at most 32, .*: got 33\."),
        ("qwen3_moe", LoRA(13, target_modules=["experts.down_proj"]), r"at most 12, .*: got 13\."),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_one_line(name: str, lora: LoRA, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as error:
        lora.inject(build(name), 0)
    assert "\n" not in str(error.value)


def test_what_peft_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Target module Odd() is not supported.\nMore lines.")

    monkeypatch.setattr("peft.inject_adapter_in_model", refuse)
    words = r"`lora` must fit MixtralFor.*peft refuses \(Target module Odd\(\) is not supported\.\)"
    with pytest.raises(ConfigurationError, match=words) as error:
        LoRA(2).inject(build("mixtral"), 0)
    assert "\n" not in str(error.value)


def test_weights_that_no_adapter_reaches_are_named_with_their_share() -> None:
    with pytest.warns(UserWarning, match=r"leaves 75% of .* without an adapter, e\.g\. .*mlp\.w1"):
        LoRA(2).inject(build("dbrx"), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRA(2).inject(build("qwen3_moe"), 0)


def test_tied_weights_are_left_alone() -> None:
    model = build("mixtral")
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight = first.weight
    LoRA(2).inject(model, 0)
    assert "k_proj" in names(model) and "q_proj" not in names(model)
