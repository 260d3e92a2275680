"""An attention kernel or compiled layers that compute wrong numbers are found before training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import scored_models
from kdrl_lightning import KDRLModule, LocalTeacher
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.head.compiled import OrPlain
from kdrl_lightning.models.architectures import fast_path
from kdrl_lightning.models.architectures.fast_path import check_fast_path
from kdrl_lightning.models.architectures.trunk import PART, Trunk, compile_layers, kernel_of
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import decoder_layers
from kdrl_lightning.teachers import CachedTeacher, RoutedTeacher

FLASH = Trunk("flash_attention_2")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(OrPlain, "failed", set())
    yield


@pytest.fixture
def scorer() -> Scorer:
    return Scorer(scored_models.build("Qwen3ForCausalLM"))


@pytest.mark.parametrize("factor", [1.0, 1.5, float("nan")])
def test_compiled_layers_that_are_off_run_plain_after_one_warning(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def compiler(layer: Any, **_: Any) -> Any:
        return lambda *args, **named: layer(*args, **named) * factor

    monkeypatch.setattr(torch, "compile", compiler)
    compile_layers(decoder_layers(scorer.model))()
    words = r"`compile` must not change .*: got a difference of .* nats for student \(at most"
    with pytest.warns(UserWarning, match=words) if factor != 1.0 else nullcontext():
        check_fast_path(scorer, Trunk(compile=True), "student")
    assert (PART in OrPlain.failed) == (factor != 1.0)
    with warnings.catch_warnings(action="error"):
        check_fast_path(scorer, Trunk(compile=True), "student")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (None, ""),
        ("other", r"log-probabilities that differ by .* nats, at most 0\.001"),
        ("raises", "no kernel image"),
    ],
)
def test_a_kernel_that_is_off_or_fails_is_one_line(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, fault: str | None, words: str
) -> None:
    """The kernel is pretended: it changes the first layer while it is chosen."""
    chosen, layer = [FLASH.attn_implementation], decoder_layers(scorer.model)[0]
    plain = layer.forward

    def forward(*args: Any, **named: Any) -> Any:
        if chosen[-1] == "eager" or fault is None:
            return plain(*args, **named)
        if fault == "raises":
            raise RuntimeError("CUDA error: no kernel image\nis available")
        return plain(*args, **named) * 1.5

    monkeypatch.setattr(layer, "forward", forward)
    monkeypatch.setattr(fast_path, "use_kernel", lambda _, name: chosen.append(name))
    refused = rf"`attn_implementation` must give .*: got flash_attention_2 for x \(.*{words}.*\)\."
    with pytest.raises(ConfigurationError, match=refused) if fault else nullcontext():
        check_fast_path(scorer, FLASH, "x")
    assert chosen[1:] == ["eager", "flash_attention_2"]


def test_in_16_bits_rounding_is_no_fault(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda layer, **_: lambda *a, **n: layer(*a, **n) * 1.004)
    compile_layers(decoder_layers(scorer.model))()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings(action="error"):
        check_fast_path(scorer, Trunk(compile=True), "student")
    with pytest.warns(UserWarning, match="`compile` must not change"):
        check_fast_path(scorer, Trunk(compile=True), "student")


def test_the_usual_kernel_is_not_compared_again(scorer: Scorer) -> None:
    scorer.chosen = None  # type: ignore[assignment,method-assign]
    check_fast_path(scorer, Trunk(), "student")
    check_fast_path(scorer, Trunk("sdpa"), "student")
    assert kernel_of(scorer.model) == "sdpa"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_on_a_gpu_compares_student_and_teachers(
    monkeypatch: pytest.MonkeyPatch, device: str, tmp_path: Any
) -> None:
    seen: list[Any] = []
    for room in ("trainer.checks.devices", "teachers.local"):
        monkeypatch.setattr(
            f"kdrl_lightning.{room}.check_fast_path", lambda *given: seen.append(given[1])
        )
    monkeypatch.setattr(LocalTeacher, "_on_device", lambda _: None)
    local = LocalTeacher("teacher", attn_implementation="flash_attention_2")
    cached = CachedTeacher(RoutedTeacher({"a": local}), str(tmp_path / "scores"))
    module: Any = SimpleNamespace(
        device=torch.device(device),
        trunk=Trunk(compile=True),
        student_path="student",
        frozen=SimpleNamespace(move=lambda _: None, check_fast_paths=cached.check_fast_path),
        trainer=SimpleNamespace(
            precision_plugin=SimpleNamespace(forward_context=nullcontext),
            strategy=SimpleNamespace(root_device=torch.device(device)),
        ),
        reduce=lambda value, _: value,
        _student=lambda: None,
    )
    KDRLModule.on_fit_start(module)
    assert seen == ([module.trunk, local.trunk] if device == "cuda" else [])
