"""Loading models and tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

from helpers.moe_models import save as save_moe
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.architectures.load_errors import reading
from kdrl_lightning.models.architectures.loaded import check_used
from kdrl_lightning.models.architectures.values import check_floats, check_stored
from kdrl_lightning.models.end_tokens import end_tokens
from kdrl_lightning.models.loading import (
    ModelSource,
    build_causal_lm,
    empty_causal_lm,
    load_causal_lm,
    load_config,
    load_tokenizer,
    model_path,
    save_causal_lm,
    unfilled_causal_lm,
)
from kdrl_lightning.models.sharding import load_scorer

LOADERS = [load_causal_lm, load_tokenizer, load_config]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("path", ["/no/such/folder", "nobody/no-such-model", "./nothing"])
def test_a_missing_path_is_one_line_with_the_path(load, path):
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(
        "a model path must be a Hugging Face folder or hub name: "
        f"got {path} (is not a local folder; "
    )
    assert message.endswith("Check the spelling, or download the model first.")
    assert "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize("load", [load_causal_lm, load_config])
def test_an_empty_folder_is_refused_and_said_to_exist(load, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        load(str(tmp_path))
    assert f"got {tmp_path} (exists; " in str(caught.value)
    assert "\n" not in str(caught.value)


# A file of a good folder, its new content (None: removed; a dict: added to the JSON), the words.
BROKEN = {
    "no weights": ("model.safetensors", None, r"hold its weights .+ Download the model again\."),
    "half a file": ("model.safetensors", b"half a file", "hold whole files of weights: .+ again"),
    "a pointer": (
        "model.safetensors",
        b"version https://git-lfs.github.com/spec/v1",
        r"not pointers to them: .+ Run `git lfs pull` in it\.",
    ),
    "a shard too few": (
        "model.safetensors.index.json",
        b'{"metadata": {}, "weight_map": {"lm_head.weight": "model-2.safetensors"}}',
        "and model-2.safetensors is missing: ",
    ),
    "an odd index": ("model.safetensors.index.json", b"{", r"an model.+ that can be read: "),
    "no configuration": ("config.json", None, r"a tokenizer alone: .+ Name the whole model's"),
    "half a configuration": ("config.json", b"{", r"hold a config.json that is JSON: .+ again\."),
    "a list for a configuration": (
        "config.json",
        b"[]",
        r"hold a config.json with settings by name: .+ again\.",
    ),
    "no type": (
        "config.json",
        {"model_type": None},
        r"name its `model_type` in .+ Add it",
    ),
    "two types": (
        "config.json",
        {"model_type": ["qwen2", "qwen3"]},
        r"name its `model_type` in .+ Add its name",
    ),
    "an unknown type": (
        "config.json",
        {"model_type": "qwen99"},
        r"transformers [\d.]+ knows, not qwen99: .+ Install a version that does, or correct `model"
        r"_type`",
    ),
    "own code": (
        "config.json",
        {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_x.X"}},
        r"not need code from its folder, and mine does: .+ Such code is never run:",
    ),
    "quantized": (
        "config.json",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"and bitsandbytes needs more: .+ or name the folder of the unquantized model\.",
    ),
    "two methods": (
        "config.json",
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "load_in_4bit": True}},
        r"not name gptq in its `quantization_config` together with `load_in_4bit`, which means "
        r"bitsandbytes: .+ Remove `load_in_4bit` from config.json, or name the folder of the unq",
    ),
    "gptq": (
        "config.json",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        r"and gptq needs more: got (?!.*bitsandbytes).+ Install what the error asks for, or name",
    ),
    "no method": (
        "config.json",
        {"quantization_config": {"bits": 4}},
        r"name the `quant_method` of its `quantization_config`: .+ Add it to config.json, or name",
    ),
    "half a method": (
        "config.json",
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        r"hold a `quantization_config` that transformers can use for compressed-tensors: .+ Correc",
    ),
    "a word for a method": (
        "config.json",
        {"quantization_config": "gptq"},
        r"hold a `quantization_config` with settings by name: .+ Correct it in config.j",
    ),
    "an unknown activation": (
        "config.json",
        {"hidden_act": "foo"},
        r"that transformers can load: .+ Correct `foo` in its files",
    ),
    "half a rotary embedding": (
        "config.json",
        {"rope_scaling": {"rope_type": "yarn"}},
        r"that transformers can load: .+ Correct its config\.json",
    ),
    "an unknown dtype": (
        "config.json",
        {"dtype": "float99"},
        r"that transformers can load: .+ Correct its config\.json",
    ),
    "other sizes": (
        "config.json",
        {"vocab_size": 20},
        r"of its config.json: got \S+ of shape \[16, 64\], and \[20, 64\] by the configuration",
    ),
    "more layers": (
        "config.json",
        {"num_hidden_layers": 3},
        r"hold all weights of a \w+: got none for model\.layers\.1\.\S+ and \d+ more\. Correct co",
    ),
    "odd sampling": ("generation_config.json", b"[]", "generation_config.json must be a JSON obj"),
    "half a sampling": ("generation_config.json", b'{"eos', "must be a JSON object"),
    "a worded end": (
        "generation_config.json",
        b'{"eos_token_id": ["1"]}',
        r"`eos_token_id` must be a token id or a list of ids: got \['1'\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_line_with_cause_and_cure(case, student_folder, tmp_path):
    name, content, words = BROKEN[case]
    if isinstance(content, dict):
        found = json.loads((Path(student_folder) / name).read_text())
        if "num_hidden_layers" in content:
            found.pop("layer_types", None)
        kept = {k: v for k, v in {**found, **content}.items() if v is not None}
        content = json.dumps(kept).encode()
    path = copy(student_folder, tmp_path, name, content)
    if name.endswith("index.json"):
        (Path(path) / "model.safetensors").rename(Path(path) / "model-1.safetensors")
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_causal_lm(path)
    assert "\n" not in str(caught.value) and "spelling" not in str(caught.value)
    assert path in str(caught.value)


@pytest.mark.parametrize("load", LOADERS)
def test_code_of_a_folder_is_refused_without_a_question(load, student_folder, tmp_path, capfd):
    settings = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_x.X"}}
    path = copy(student_folder, tmp_path, "config.json", json.dumps(settings).encode())
    with pytest.raises(ConfigurationError, match="not need code from its folder"):
        load(path)
    assert "y/N" not in capfd.readouterr().out


@pytest.mark.parametrize("load", LOADERS)
def test_a_file_is_no_model(load, tmp_path):
    (tmp_path / "step=1.ckpt").write_bytes(b"1")
    words = r"\(is a file; .+\)\. Name a folder; `export` writes one from a checkpoint\."
    with pytest.raises(ConfigurationError, match=words):
        load(str(tmp_path / "step=1.ckpt"))


def test_shards_of_a_checkpoint_are_exported_first(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"1")
    with pytest.raises(ConfigurationError, match="Turn a checkpoint into a model with `export`"):
        load_causal_lm(str(tmp_path))


def test_a_gated_name_says_how_to_get_in():
    words = r"Accept its terms on its page and log in with `hf auth login`\."
    with pytest.raises(ConfigurationError, match=words), reading("meta/llama"):
        raise OSError("You are trying to access a gated repo.\nMore.")


# A file of a good folder, its new content (a dict: added to the JSON), the words.
BROKEN_TOKENIZERS: dict[str, tuple[str, Any, str]] = {
    "half a file": (
        "tokenizer.json",
        b'{"version"',
        r"hold a tokenizer.json that is JSON: .+ again",
    ),
    "half of its settings": (
        "tokenizer_config.json",
        b"{",
        r"hold a tokenizer_config.json that is J",
    ),
    "a list": (
        "special_tokens_map.json",
        b"[1]",
        r"a special_tokens_map.json with settings by name",
    ),
    "a pointer": (
        "tokenizer.json",
        b"version https://git-lfs.github.com/spec/v1",
        r"not pointers to it as tokenizer\.json: .+ Run `git lfs pull` in it\.",
    ),
    "an unknown model": (
        "tokenizer.json",
        {"model": {"type": "No"}},
        r"Correct tokenizer\.json, or",
    ),
    "an odd truncation": ("tokenizer.json", {"truncation": {}}, r"Correct tokenizer\.json, or"),
    "an unknown side": (
        "tokenizer_config.json",
        {"padding_side": "middle"},
        r"can load: .+ Correct tokenizer_config\.json, or download the tokenizer again\.",
    ),
    "a number for a token": (
        "tokenizer_config.json",
        {"pad_token": 0},
        r"Correct tokenizer_config",
    ),
    "added tokens as text": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"3": "a"}},
        r"Correct tokenizer_config\.json, or",
    ),
    "a configuration without a size": (
        "config.json",
        {"text_config": 5},
        r"Correct its config\.json",
    ),
}


@pytest.mark.parametrize("case", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_told_from_a_broken_model(case, student_folder, tmp_path):
    name, content, words = BROKEN_TOKENIZERS[case]
    if isinstance(content, dict):
        content = json.dumps(
            json.loads((Path(student_folder) / name).read_text()) | content
        ).encode()
    path = copy(student_folder, tmp_path, name, content)
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_tokenizer(path)
    assert ("config.json" in name) or " config.json" not in str(caught.value)


def test_other_files_of_a_tokenizer_are_named(student_folder, tmp_path):
    path = copy(student_folder, tmp_path, "tokenizer.json", None)
    (Path(path) / "tokenizer.model").write_bytes(b"xx")
    with pytest.raises(ConfigurationError, match=r"Correct tokenizer\.model, or download"):
        load_tokenizer(path)


def test_weights_that_are_none_are_no_mistake_of_the_configuration(student_folder, tmp_path):
    path = copy(student_folder, tmp_path, "model.safetensors", None)
    (Path(path) / "pytorch_model.bin").write_bytes(b"abc")
    words = r"hold weights that transformers can load: .+ Download the model again\."
    with pytest.raises(ConfigurationError, match=words):
        load_causal_lm(path)


def test_a_hub_name_in_the_cache_is_not_a_misspelling(student_folder, monkeypatch):
    file = str(Path(student_folder) / "config.json")
    place = "kdrl_lightning.models.architectures.load_errors.try_to_load_from_cache"
    monkeypatch.setattr(place, lambda *_: file)
    words = r"got some/model \(exists; no\)\. Correct tokenizer_config\.json"
    with pytest.raises(ConfigurationError, match=words), reading("some/model", "tokenizer"):
        raise ValueError("no")


@pytest.mark.parametrize("rename", ["module.{}", "{}.base"])
def test_weights_under_other_names_are_not_replaced_by_random_ones(
    rename, student_folder, tmp_path
):
    held = load_file(Path(student_folder) / "model.safetensors")
    path = copy(student_folder, tmp_path, "model.safetensors", None)
    named = {rename.format(name): value for name, value in held.items()}
    save_file(named, Path(path) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"got none for .+ \(the files also hold .+\)\. "):
        load_causal_lm(path)


def with_scale(folder: str, to: Path) -> str:
    path = copy(folder, to, "README.md", b"")
    file = Path(path) / "model.safetensors"
    scale = {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}
    save_file({**load_file(file), **scale}, file, metadata={"format": "pt"})
    return path


def test_a_scale_that_no_layer_multiplies_with_is_refused(student_folder, tmp_path):
    path = with_scale(student_folder, tmp_path)
    words = (
        r"got model\.layers\.0\.mlp\.up_proj\.weight_scale_inv in the files, and a Linear without"
    )
    with pytest.raises(ConfigurationError, match=words):
        load_causal_lm(path)


def test_weights_of_layers_that_a_model_lacks_are_left_out(student_folder):
    drafting = ["model.layers.9.up_proj.weight", "vision.bias", "bias"]
    check_used(load_causal_lm(student_folder), drafting, "here")


REFUSED = [
    {"num_return_sequences": 2},
    {"num_beams": 1, "num_return_sequences": 3, "temperature": 0.2},
    {"max_new_tokens": -5},
    {"early_stopping": "sometimes"},
    {"max_new_tokens": "20"},
]


@pytest.mark.parametrize("said", REFUSED)
def test_how_others_sample_keeps_no_model_from_loading(said, student_folder, tmp_path):
    content = json.dumps({"eos_token_id": [1, 4], **said}).encode()
    path = copy(student_folder, tmp_path, "generation_config.json", content)
    model = load_causal_lm(path)
    again, _ = unfilled_causal_lm(path, "auto")
    for found in (model.generation_config, again.generation_config):
        assert {name: getattr(found, name) for name in said} == said
        assert found.eos_token_id == [1, 4]
    assert end_tokens(path, load_tokenizer(path)).ids == (1, 4)
    text = model.generation_config.to_json_string()
    built = build_causal_lm(model.config.to_json_string(), text, model.state_dict())
    save_causal_lm(built, tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved/generation_config.json").read_text()).items() >= said.items()
    )


def copy(folder: str, to: Path, name: str, content: bytes | None) -> str:
    """Copy a model's folder with one file changed, or left out if None."""
    shutil.copytree(folder, to / "copy")
    file = to / "copy" / name
    file.unlink() if content is None else file.write_bytes(content)
    return str(to / "copy")


@pytest.mark.parametrize("files", [(), ("config.json", "model.safetensors")])
def test_a_folder_without_tokenizer_is_refused(student_folder, tmp_path, files):
    for name in files:
        shutil.copy(Path(student_folder) / name, tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value) == (
        f"a model folder must hold its tokenizer: got {tmp_path} without one. "
        "Save it there with `tokenizer.save_pretrained`."
    )


def with_end_token(folder: str, to: Path, **settings: str | None) -> str:
    """Copy a model's folder with another end token, or none, in the tokenizer's settings."""
    found = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    del found["eos_token"]
    return copy(folder, to, "tokenizer_config.json", json.dumps({**found, **settings}).encode())


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"eos_token": None}, None),
        # One that is not in the vocabulary is added after it, where the model has no row.
        ({"eos_token": "<end>"}, 16),
        # transformers puts in the one that its Qwen2 tokenizers have.
        ({}, 16),
    ],
)
def test_an_end_token_that_is_missing_or_unknown_is_refused(
    student_folder, tmp_path, settings, found
):
    path = with_end_token(student_folder, tmp_path, **settings)
    with pytest.raises(ConfigurationError) as caught:
        load_tokenizer(path)
    assert str(caught.value) == (
        f"the tokenizer of `{path}` must have an end token that the model knows (below 16): "
        f"got {found}. Set its `eos_token`."
    )


def test_the_models_last_id_may_be_the_end_token(student_folder, tmp_path):
    path = with_end_token(student_folder, tmp_path, eos_token="#")
    assert load_tokenizer(path).eos_token_id == load_config(path).vocab_size - 1 == 15


def test_a_model_is_loaded_for_evaluation(student_folder):
    model = load_causal_lm(student_folder)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_model_is_loaded_in_the_asked_type(student_folder, dtype):
    assert {p.dtype for p in load_causal_lm(student_folder, dtype).parameters()} == {torch.bfloat16}


def test_config_and_tokenizer_are_those_of_the_folder(student_folder):
    assert load_config(student_folder).hidden_size == 64
    assert load_tokenizer(student_folder).eos_token_id == 1


def test_a_path_is_its_own_path():
    assert model_path("some/model") == "some/model"


def test_a_source_is_asked_for_its_path():
    class Source(ModelSource):
        def path(self) -> str:
            return "made/here"

    assert model_path(Source()) == "made/here"


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("merged", [False, True])
def test_a_folder_with_an_adapter_is_named_with_its_base(load, merged, student_folder, tmp_path):
    path = str(tmp_path / "copy")
    if merged:
        shutil.copytree(student_folder, path)
    else:
        (tmp_path / "copy").mkdir()
    text = json.dumps({"base_model_name_or_path": "some/base", "peft_type": "LORA"})
    (tmp_path / "copy" / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert str(caught.value) == (
        f"a model path must hold a whole model: got {path}, an adapter of some/base. Merge it "
        "first (peft: `AutoPeftModelForCausalLM.from_pretrained(...)`, then "
        "`merge_and_unload().save_pretrained(...)`), or train new adapters on the base with "
        "`lora`." + (" If its weights are merged, remove adapter_config.json." if merged else "")
    )


def test_an_adapter_that_names_no_base_is_named_as_well(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="an adapter of another model"):
        load_causal_lm(str(tmp_path))


def test_a_model_of_another_kind_is_not_a_matter_of_spelling(tmp_path):
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    words = (
        f"a model must be a causal language model: got {tmp_path}, a t5 that transformers does not "
        "load as one."
    )
    with pytest.raises(ConfigurationError, match=words):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "jamba", "qwen3_next"])
def test_experts_run_in_float64(name, student_folder, tmp_path):
    """The same log-probabilities as in float32, and gradients, from every way of making a model."""
    path = save_moe(name, tmp_path, student_folder)
    ids = torch.arange(12)[None] % 32
    plain, double = load_causal_lm(path), load_causal_lm(path, torch.float64)
    wanted = plain(input_ids=ids, use_cache=False).logits.double()
    copied = empty_causal_lm(double, "cpu")
    copied.load_state_dict(double.state_dict())
    for model in (double, copied):
        found = model(input_ids=ids, use_cache=False).logits
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    double(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    experts = {n: p.grad for n, p in double.named_parameters() if "experts" in n}
    assert experts and all(grad is not None for grad in experts.values())
    assert plain.config._experts_implementation == "grouped_mm"  # stays the fast one


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.uint8])
def test_a_quantized_student_is_refused(kind, student_folder, monkeypatch):
    model = load_causal_lm(student_folder)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(kind), requires_grad=False)
    monkeypatch.setattr("kdrl_lightning.models.sharding.load_causal_lm", lambda *_: model)
    words = (
        rf"must not be quantized to be trained: got model\.layers\.0\.mlp\.up_proj\.weight in "
        rf"{str(kind)[6:]}\. Name the folder of the unquantized model"
    )
    with pytest.raises(ConfigurationError, match=words):
        load_scorer("here", torch.float32)


def rounded(folder: str, path: Path, kind: torch.dtype) -> str:
    """A copy whose matrices are in an integer type, without any word about it."""
    shutil.copytree(folder, path)
    file = path / "model.safetensors"
    weights = {
        name: (value / value.abs().max() * 100).round().to(kind) if value.dim() > 1 else value
        for name, value in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
    return str(path)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_whole_numbers_are_no_weights(dtype, student_folder, tmp_path):
    path = rounded(student_folder, tmp_path / "int8", torch.int8)
    words = (
        rf"^the weights of `{path}` must be floats: got whole numbers in \S+, as files of "
        r"quantized models hold them, and no `quantization_config` that transformers knows\. Add"
    )
    with pytest.raises(ConfigurationError, match=words):
        load_scorer(path, dtype, frozen=True)
    config = Path(path, "config.json")
    unknown = {"quantization_config": {"quant_method": "ours"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | unknown))
    with pytest.raises(ConfigurationError, match=words):
        load_scorer(path, dtype, frozen=True)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("which", ["q_proj.weight", "q_proj.bias"])
def test_an_integer_type_in_a_file_is_no_weight(form, which, student_folder, tmp_path):
    path = tmp_path / "cut"
    shutil.copytree(student_folder, path)
    weights = load_file(path / "model.safetensors")
    name = next(n for n in weights if n.endswith(which))
    weights[name] = weights[name].to(torch.int8)  # all zero
    if form == "bin":
        (path / "model.safetensors").unlink()
        torch.save(weights, path / "pytorch_model.bin")
    else:
        save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=f"must be floats: got whole numbers in {name}"):
        load_causal_lm(str(path))


def test_integers_of_buffers_are_no_weights(student_folder, tmp_path):
    model, found = load_causal_lm(student_folder), {"model.layers.0.mask": torch.ones(2).bool()}
    save_file({**found, "lm_head.weight": torch.ones(1).char()}, tmp_path / "model.safetensors")
    check_stored(model, tmp_path, ["lm_head.weight"], "here")
    with pytest.raises(ConfigurationError, match=r"got whole numbers in lm_head\.weight"):
        check_stored(model, tmp_path, [], "here")
    model.hf_quantizer = object()
    check_stored(model, tmp_path, [], "here")


def test_constant_and_ternary_weights_are_floats(student_folder, monkeypatch):
    model = load_causal_lm(student_folder)
    with torch.no_grad():
        layer = model.model.layers[0].mlp.up_proj.weight
        layer.copy_(layer.sign())
        model.model.norm.weight.fill_(3.0)
    check_floats(model, "here")
    layer.data.mul_(torch.arange(8).repeat(layer.numel() // 8).view_as(layer))
    with pytest.raises(ConfigurationError, match=r"got whole numbers in model\.layers\.0\.ml"):
        check_floats(model, "here")
    model.hf_quantizer = object()  # transformers unpacks them
    check_floats(model, "here")
