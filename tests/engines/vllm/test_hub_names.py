"""Weights sent to vLLM have the names, layouts and values of the student's folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.architectures.families import build, save
from kdrl_lightning import LoRA
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights

# What a folder names otherwise than the model: experts (two layouts), a head, layers, everything.
FAMILIES = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w3.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.2.up_proj.weight",
    "granitemoe": "model.layers.1.block_sparse_moe.input_linear.weight",
    "gpt_neox": "embed_out.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj",
    "glm4_moe": "model.layers.1.mlp.gate.e_score_correction_bias",
    "hrm_text": "model.H_module.layers.1.attn.gqkv_proj.weight",
    "gemma3": "language_model.model.layers.1.mlp.up_proj.weight",
    "gemma2": "model.embed_tokens.weight",
    "qwen2": "lm_head.weight",
}


def loaded(family: str, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    return load_causal_lm(save(family, folder)), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_layouts_and_values_are_the_folders(family: str, tmp_path: Path) -> None:
    model, folder = loaded(family, tmp_path)
    assert FAMILIES[family] in folder
    weights = HubWeights(ModelWeights(model, str(tmp_path)))
    sent = dict(weights.tensors())
    assert sent.keys() == folder.keys()
    assert all(torch.equal(sent[name], folder[name]) for name in folder)
    described = list(weights.described())
    assert described == [(name, t.dtype, tuple(t.shape)) for name, t in sent.items()]


def test_a_model_that_was_never_in_a_folder_gets_the_same_names(tmp_path: Path) -> None:
    folder = loaded("mixtral", tmp_path)[1]
    sent = dict(HubWeights(ModelWeights(build("mixtral"), "new")).tensors())
    assert all(torch.equal(sent[name], folder[name]) for name in folder)


def test_tied_weights_go_once(tmp_path: Path) -> None:
    model, folder = loaded("gemma2", tmp_path)
    assert "lm_head.weight" in model.state_dict() and "lm_head.weight" not in folder
    sent = [name for name, _ in HubWeights(ModelWeights(model, str(tmp_path))).tensors()]
    assert sorted(sent) == sorted(folder)


def test_a_head_that_only_could_be_tied_goes_too(tmp_path: Path) -> None:
    model = load_causal_lm(save("llama", tmp_path))
    model.all_tied_weights_keys["lm_head.weight"] = "model.embed_tokens.weight"
    sent = dict(HubWeights(ModelWeights(model, str(tmp_path))).tensors())
    assert torch.equal(sent["lm_head.weight"], model.lm_head.weight)


def test_experts_that_do_nothing_send_nothing(tmp_path: Path) -> None:
    model, folder = loaded("longcat_flash", tmp_path)  # it has 4 experts, and 2 that do nothing
    weights = HubWeights(ModelWeights(model, str(tmp_path)))
    sent = {name for name, _ in weights.tensors()}
    assert [name for name, _, _ in weights.described()] == [n for n, _ in weights.tensors()]
    idle = {name for name in folder if ".experts.4." in name or ".experts.5." in name}
    assert idle and sent == folder.keys() - idle


def test_at_most_a_layers_experts_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = loaded("mixtral", tmp_path)
    reads: list[str] = []
    whole = ModelWeights._whole

    def count(self: Any, name: str, *rest: Any) -> Tensor:
        reads.append(name)
        return whole(self, name, *rest)

    monkeypatch.setattr(ModelWeights, "_whole", count)
    taken = iter(HubWeights(ModelWeights(model, str(tmp_path))).tensors())
    most, before = 0, 0
    for _ in taken:
        most, before = max(most, len(reads) - before), len(reads)
    assert most == 2  # gate_up_proj and down_proj of one layer
    assert Counter(reads).most_common(1)[0][1] == 1


def test_adapters_are_merged_under_the_folders_names(tmp_path: Path) -> None:
    model, folder = loaded("gpt_neox", tmp_path)
    LoRA(4, target_modules=["dense"]).inject(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    sent = dict(HubWeights(ModelWeights(model, str(tmp_path))).tensors())
    assert sent.keys() == folder.keys()
    moved = {name for name in folder if not torch.equal(sent[name], folder[name])}
    assert moved == {f"gpt_neox.layers.{i}.attention.dense.weight" for i in range(4)}
    export = tmp_path / "export"
    ModelWeights(model, str(tmp_path)).save(str(export))
    exported = load_file(export / "model.safetensors")
    assert all(torch.equal(sent[name], exported[name]) for name in moved)


def test_names_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    model, _ = loaded("mixtral", tmp_path)
    names = [n for n, _ in HubWeights(ModelWeights(model, str(tmp_path))).tensors()]
    layers = [int(n.split(".")[2]) for n in names if n.startswith("model.layers.")]
    # vLLM keeps what belongs to a layer until it is complete.
    assert layers == sorted(layers) and len(set(layers)) == 4
