"""The engine's settings; in separate processes, the real engine alone and in whole runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.with_vllm.need import ROOT, need_vllm, run
from kdrl_lightning.engines import Sampling, VLLMEngine
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights


def test_the_real_engine(tmp_path: Path) -> None:
    need_vllm()
    # vLLM initialises torch.distributed and takes threads: not in this process.
    cases = str(ROOT / "tests/engines/vllm/engine_cases.py")
    out = run(["pytest", "-n0", "-W", "default", "-q", cases], ROOT, timeout=300)
    assert out.returncode == 0, out.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", out.stdout)[1]) >= 20 and "skipped" not in out.stdout  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpu_memory_utilization": 0.0}, r"`gpu_memory_utilization` must be above 0 and at most"),
        ({"gpu_memory_utilization": 1.5}, r"`gpu_memory_utilization` must be above 0 and at most"),
        ({"max_model_len": 0}, r"`max_model_len` must be at least 1: got 0"),
        ({"max_sequences": 0}, r"`max_sequences` must be at least 1: got 0"),
        ({"kv_cache_memory_bytes": 0}, r"`kv_cache_memory_bytes` must be at least 1: got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        VLLMEngine(**settings)  # type: ignore[arg-type]


def test_sleep_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=r"`sleep` must be false without a GPU: got true"):
        VLLMEngine(sleep=True)


def test_without_vllm_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'kdrl_lightning\[vllm\]'"):
        VLLMEngine()


class FakeLLM:
    """Writes down what is asked of it."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {tags[0]}")

    def collective_rpc(self, method: str, kwargs: Any) -> None:
        assert len(list(kwargs["weights_iterator"])) > 3
        self.calls.append(method)

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")


def test_the_order_of_sleeping_and_waking(
    monkeypatch: pytest.MonkeyPatch, student_folder: str
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    engine = VLLMEngine(sleep=True)
    monkeypatch.setattr(engine, "_start", lambda path, on_gpu: FakeLLM(calls))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weights = ModelWeights(load_causal_lm(student_folder), student_folder)
    engine.setup(weights, 1, 0)
    with pytest.raises(TrainingStopped, match="must have weights to sample from"):
        engine.generate([[5]], [[0]], Sampling(4))
    pushed = ["empty", "wake weights", "reload_weights", "wake kv_cache", "reset"]
    for version in (0, 4):
        engine.update_weights(weights, version)
        assert engine.version == version
        engine.release()
        engine.release()  # asleep already
        assert engine.version not in (None, version)  # so that the next generation pushes
    assert calls == ["sleep 2", *pushed, "sleep 2", *pushed, "sleep 2"]


def test_a_cache_that_stays_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, student_folder: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(FakeLLM, "reset_prefix_cache", lambda self: False)
    engine = VLLMEngine()
    monkeypatch.setattr(engine, "_start", lambda path, on_gpu: FakeLLM([]))
    weights = ModelWeights(load_causal_lm(student_folder), student_folder)
    engine.setup(weights, 1, 0)
    engine._sampled = True  # requests of an earlier rollout hold the cache
    with pytest.raises(TrainingStopped, match="the prefix cache is still in use"):
        engine.update_weights(weights, 0)
