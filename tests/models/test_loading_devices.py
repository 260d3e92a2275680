"""Where models are loaded: on the CPU, although Lightning makes a rank's GPU the default device.

A build of torch without CUDA raises if anything is made on "cuda", so these tests need no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.accelerate as in_transformers
from lightning.pytorch.strategies import SingleDeviceStrategy

from helpers.short_runs import fit, make_data, make_module, make_trainer
from kdrl_lightning import GRPO, KDRL, LocalTeacher, LoRA
from kdrl_lightning.models.loading import ModelSource, load_causal_lm, model_path
from kdrl_lightning.teachers import CachedTeacher, RoutedTeacher, Teacher

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a build with CUDA makes such tensors"),
]
SMALL: dict[str, Any] = {"val_prompts": None, "prompts_per_rollout": 2, "group_size": 2}


class RootDevice(SingleDeviceStrategy):
    """Makes "cuda" the default device while models are loaded, as with one GPU and under ddp."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        with super().tensor_init_context(empty_init=empty_init), torch.device("cuda"):
            yield


@pytest.fixture(autouse=True)
def _no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_transformers, "is_accelerate_available", lambda: False)


def teachers(folder: str, tmp_path: Path) -> dict[str, Teacher | str | None]:
    routed = {"a": LocalTeacher(folder), "b": LocalTeacher(folder, offload=True)}
    return {
        "none": None,
        "local": folder,
        "offloaded": LocalTeacher(folder, offload=True),
        "cached": CachedTeacher(LocalTeacher(folder), str(tmp_path / "scores.sqlite")),
        "routed": RoutedTeacher(routed, column="prompt"),
    }


@pytest.mark.parametrize("kind", ["none", "local", "offloaded", "cached", "routed"])
def test_a_run_loads_its_models_on_the_cpu(
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RoutedTeacher, "route", lambda self, row: 0)
    teacher = teachers(teacher_folder, tmp_path)[kind]
    objective = GRPO(ref_kl_coef=0.1) if teacher is None else KDRL()
    module = make_module(student_folder, teacher, objective)
    fit(tmp_path, module, make_data(**SMALL), max_steps=1, strategy=RootDevice("cpu"))
    assert {p.device.type for p in module.weights().model.parameters()} == {"cpu"}


def test_adapters_are_made_on_the_cpu(tmp_path: Path, student_folder: str) -> None:
    module = make_module(student_folder, None, GRPO(ref_kl_coef=0.1), lora=LoRA(rank=2))
    fit(tmp_path, module, make_data(**SMALL), max_steps=1, strategy=RootDevice("cpu"))
    assert {p.device.type for p in module.parameters()} == {"cpu"}


def test_an_evaluation_loads_on_the_cpu(tmp_path: Path, student_folder: str) -> None:
    module = make_module(student_folder, None, GRPO())
    trainer = make_trainer(tmp_path, strategy=RootDevice("cpu"))
    trainer.test(module, datamodule=make_data(), verbose=False)
    assert {p.device.type for p in module.parameters()} == {"cpu"}


def test_a_model_source_may_load_too(student_folder: str) -> None:
    class Made(ModelSource):
        def path(self) -> str:
            assert torch.zeros(1).device.type == "cpu"
            return student_folder

    with torch.device("cuda"):
        assert model_path(Made()) == student_folder


def test_the_default_device_of_a_script_does_not_matter(student_folder: str) -> None:
    torch.set_default_device("cuda")
    try:
        model = load_causal_lm(student_folder)
    finally:
        torch.set_default_device(None)
    assert model.device.type == "cpu"
