"""Loading models and tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import T5Config

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models import (
    ModelSource,
    load_causal_lm,
    load_config,
    load_tokenizer,
    model_path,
)

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


def copy(folder: str, to: Path, name: str, content: bytes | None) -> str:
    """Copy a model's folder with one file changed, or left out if None."""
    shutil.copytree(folder, to / "copy")
    file = to / "copy" / name
    file.unlink() if content is None else file.write_bytes(content)
    return str(to / "copy")


@pytest.mark.parametrize("content", [None, b"half a file"])
def test_weights_that_are_missing_or_broken_are_refused(student_folder, tmp_path, content):
    path = copy(student_folder, tmp_path, "model.safetensors", content)
    with pytest.raises(ConfigurationError, match=r"\(exists; .+\)\. Check"):
        load_causal_lm(path)


def test_weights_of_another_shape_are_refused(student_folder, tmp_path):
    config = json.loads((Path(student_folder) / "config.json").read_text())
    text = json.dumps({**config, "hidden_size": 32}).encode()
    with pytest.raises(ConfigurationError, match=r"\(exists; .+\)\. Check"):
        load_causal_lm(copy(student_folder, tmp_path, "config.json", text))


@pytest.mark.parametrize("load", LOADERS)
def test_a_config_that_is_no_json_is_refused(load, student_folder, tmp_path):
    path = copy(student_folder, tmp_path, "config.json", b"{")
    with pytest.raises(ConfigurationError, match=r"\(exists; .+\)\. Check"):
        load(path)


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
        # One that is not in the vocabulary is added behind it, where the model has no row.
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
        f"got {found}. Set `eos_token` in it."
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
