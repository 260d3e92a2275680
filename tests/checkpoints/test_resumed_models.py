"""Resuming models whose configuration, gradients or versions differ from plain decoders'."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3Config

from helpers.odd_models import plain, with_images, with_sines
from helpers.resumed_runs import Setting, run, same_batches, same_weights
from kdrl_lightning import GRPO, KDRL
from kdrl_lightning.checkpoints.resume import check_identity, difference
from kdrl_lightning.cli.export import export
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import frozen_names, load_causal_lm
from kdrl_lightning.models.sharding import load_scorer

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*of the (completions|groups):UserWarning",
        "ignore:The number of training batches:UserWarning",
        "ignore:.*cannot be read in parts.*:UserWarning",
        "ignore:.*:FutureWarning",
    ),
    pytest.mark.usefixtures("ends_the_group"),
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("strategy", ["auto", "fsdp2", "fsdp2_full"])
@pytest.mark.parametrize("make", [with_images, with_sines])
def test_such_a_model_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, strategy: str, make: Callable[[Path], str]
) -> None:
    student = make(tmp_path / "start")
    trainer = {"strategy": strategy, "devices": 1, "max_steps": 4}
    setting = Setting(student, None, GRPO, {"val_prompts": None}, trainer)  # type: ignore[arg-type]
    whole = run(tmp_path / "whole", setting, save="steps")
    begun = dict(load_causal_lm(student).named_parameters(remove_duplicate=False))
    trained = whole.weights()
    still = {name for name in begun if torch.equal(begun[name], trained[name])}
    unused = r".*(vision|multi_modal_projector|encoder_attn|embed_positions).*"
    # Text reaches no weight of the vision tower, and a decoder alone attends to no encoder.
    assert still and all(re.fullmatch(unused, name) for name in still)
    assert ("model.decoder.embed_positions.weight" in still) == (make is with_sines)
    whole.module.export(str(tmp_path / "own"))
    export(whole.checkpoints[4], str(tmp_path / "out"))
    for name in ("own", "out"):
        loaded = dict(load_causal_lm(str(tmp_path / name)).named_parameters(remove_duplicate=False))
        same_weights(trained, {key: value.detach() for key, value in loaded.items()})
    for step in (1, 2):
        rest = run(tmp_path / f"rest{step}", setting, whole.checkpoints[step])
        same_batches(whole.seen[step:], rest.seen)
        same_weights(trained, rest.weights())


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_full"])
def test_a_weight_whose_first_gradient_comes_late_has_the_moments_of_a_new_one(
    tmp_path: Path, student_folder: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an expert that gets its first token after the resume: bias correction restarts."""
    from kdrl_lightning import KDRLModule

    real = KDRLModule.on_before_optimizer_step

    def without_gradient(self: Any, optimizer: Any) -> None:
        if self.trainer.global_step < 3:
            self.student.model.model.layers[0].mlp.up_proj.weight.grad = None
        real(self, optimizer)

    monkeypatch.setattr(KDRLModule, "on_before_optimizer_step", without_gradient)
    trainer = {"strategy": strategy, "devices": 1, "max_steps": 6}
    setting = Setting(student_folder, None, GRPO, {"val_prompts": None}, trainer)  # type: ignore[arg-type]
    whole = run(tmp_path / "whole", setting, save="steps")
    begun = load_file(Path(student_folder) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(whole.weights()[name], begun[name])
    for step in (2, 4):
        rest = run(tmp_path / f"rest{step}", setting, whole.checkpoints[step])
        same_weights(whole.weights(), rest.weights())


# ---- what an architecture keeps frozen


def test_frozen_weights_stay_frozen(tmp_path: Path) -> None:
    path = with_sines(tmp_path)
    name = "model.decoder.embed_positions.weight"
    assert frozen_names(load_causal_lm(path)) == {name}
    student, teacher = (load_scorer(path, torch.float32, frozen=f) for f in (False, True))
    held = {n for n, p in student.model.named_parameters() if not p.requires_grad}
    assert held == {name}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert frozen_names(load_causal_lm(plain(tmp_path / "plain"))) == set()


# ---- identity across versions


def as_json(**changes: Any) -> str:
    config = AutoConfig.for_model("qwen3", hidden_size=64, num_hidden_layers=2)
    return json.dumps(json.loads(config.to_json_string(use_diff=False)) | changes)


def without(text: str, *names: str) -> str:
    return json.dumps({k: v for k, v in json.loads(text).items() if k not in names})


@pytest.mark.parametrize(
    "older",
    [
        as_json(transformers_version="4.51.0"),
        as_json(torch_dtype="bfloat16", dtype=None),
        as_json(num_beams=1, temperature=1.0, is_decoder=False, some_new_switch=None),
        as_json(initializer_range=0.01, attention_dropout=0.1, pad_token_id=5, use_cache=False),
        without(as_json(), "layer_types", "attention_bias", "max_window_layers"),
        # Version 4 wrote rope's settings under other names.
        without(as_json(rope_theta=10000.0, rope_scaling=None), "rope_parameters"),
    ],
)
def test_a_checkpoint_of_another_version_is_the_same_student(older: str) -> None:
    here = as_json()
    assert here != older
    assert difference(here, older) is None and difference(older, here) is None


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"hidden_size": 32}, "hidden_size"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "qwen2"}, "model_type"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
         "rope_parameters.rope_theta"),
    ],
)  # fmt: skip
def test_another_model_is_not(changes: dict[str, Any], name: str) -> None:
    found = difference(as_json(), as_json(**changes))
    assert found is not None and found[0] == name
    older = without(as_json(rope_theta=5.0), "rope_parameters")
    assert difference(as_json(), older) == ("rope_parameters.rope_theta", 10000.0, 5.0)


def test_an_unknown_type_is_compared_as_it_stands() -> None:
    assert difference(as_json(model_type="mystery"), as_json(model_type="mystery")) is None
    found = difference(as_json(model_type="mystery"), as_json(model_type="mystery", head_dim=7))
    assert found == ("head_dim", 128, 7)


def test_the_difference_is_named(tmp_path: Path) -> None:
    from types import SimpleNamespace

    module: Any = SimpleNamespace(lora=None)
    saved = {"config": as_json(head_dim=7), "student": "elsewhere", "lora": None}
    words = r"must hold this student: got x\.ckpt, whose head_dim is 7 instead of 128.*elsewhere"
    with pytest.raises(ConfigurationError, match=words):
        check_identity(saved, module, Qwen3Config(hidden_size=64, num_hidden_layers=2), False,
                       "x.ckpt")  # fmt: skip


# ---- weights that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, student_folder: str, value: float, role: str, dtype: torch.dtype
) -> None:
    broken = Path(plain(tmp_path / "broken"))
    weights = {k: v.to(dtype) for k, v in load_file(broken / "model.safetensors").items()}
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        weights[name].view(-1)[3] = value
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    folders = (str(broken), student_folder) if role == "student" else (student_folder, str(broken))
    setting = Setting(*folders, lambda: KDRL(0.5), {}, {"max_steps": 1})
    words = (
        rf"weights of `{broken}` must be finite: got NaN or .* in model\.layers\.1\.mlp\.up_proj"
    )
    with pytest.raises(ConfigurationError, match=words):
        run(tmp_path, setting, save="never")
