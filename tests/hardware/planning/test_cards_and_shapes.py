"""Sizes of memory as text, known GPUs, and configurations of models without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.hardware.planning.cards import CARDS, bytes_of, card_named
from kdrl_lightning.hardware.planning.shapes import config_of, shipped

# Numbers of weights on the models' pages, embeddings included.
WEIGHTS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_shipped_shape_has_the_weights_of_its_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name, {}))
    assert sum(p.numel() for p in model.parameters()) == WEIGHTS[name]


def test_every_model_of_the_recipes_is_shipped() -> None:
    text = "".join(
        path.read_text() for path in (Path(__file__).parents[3] / "configs/recipes").rglob("*.yaml")
    )
    named = {
        word.strip(",}`")
        for word in text.split()
        if word.startswith(("Qwen/", "deepseek-ai/", "Skywork/", "HuggingFaceTB/", "meta-llama/"))
    }
    assert len(named) > 6
    assert named <= set(shipped())


@pytest.mark.parametrize("text", ["80", "80 XB", "GB", "-80GB", "0GB", "80GB80", ""])
def test_memory_needs_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"`--gpu-memory` must be a number above 0 with .*"
    ):
        bytes_of(text)


@pytest.mark.parametrize(("name", "cure"), [("H10", "Did you mean H100"), ("TPU", "--gpu-memory")])
def test_an_unknown_card_is_one_line(name: str, cure: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"`--card` must be one of .* got {name}. .*{cure}"
    ):
        card_named(name)
    assert card_named("h100") is CARDS[1]


def test_a_configuration_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    assert config_of("my/model", {"my/model": str(file)}).hidden_size == 64
    assert config_of("my/model", {"my/model": str(tmp_path)}).hidden_size == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"`--model-config my/model` must be a config.json: got .*config.json \("),
        ("[]", "`--model-config my/model` must be a config.json: got .*, without settings"),
        ('{"model_type": "abacus"}', "must be of an architecture .* got model_type abacus"),
        ('{"model_type": "llama", "hidden_size": 7}', "must be of an architecture .* llama"),
        ("{}", "must be of an architecture .* got model_type None"),
    ],
)
def test_a_bad_configuration_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        config_of("my/model", {"my/model": str(file)})


def test_a_missing_configuration_says_where_to_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ConfigurationError, match=r"got none for no/model. .*`--model-config no/mod"
    ):
        config_of("no/model", {})
