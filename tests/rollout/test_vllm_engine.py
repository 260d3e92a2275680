"""The engine's settings; and, in processes of their own, the real one alone and in whole runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "vllm"))
from need import ROOT, need_vllm, run

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rollout import VLLMEngine


def test_the_real_engine(tmp_path: Path) -> None:
    need_vllm()
    # vLLM initialises torch.distributed and takes threads: not in this process.
    cases = str(ROOT / "tests/vllm/engine_cases.py")
    out = run(["pytest", "-p", "no:xdist", "-W", "default", "-q", cases], ROOT, timeout=300)
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
