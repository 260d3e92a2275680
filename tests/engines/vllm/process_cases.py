"""Real vLLM with a process group: ``test_process`` runs these cases in a separate process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import distributed

from helpers.with_vllm.models import EOS, PAD, make_model, save_model, worst_gap
from kdrl_lightning.engines import Sampling, VLLMEngine
from kdrl_lightning.engines.vllm.process import close_running
from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout.live import LiveSampler

PROMPTS, SEEDS = [[5, 9, 13], [7]], [[1, 2], [3, 4]]
BOUND = 1e-4


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_running()
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture
def group(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def alive() -> bool:
    one = torch.ones(1)
    distributed.all_reduce(one)
    return float(one) == 1.0


def started(path: str, model: Any, version: int = 0) -> VLLMEngine:
    engine = VLLMEngine(kv_cache_memory_bytes=16 << 20, max_model_len=64)
    engine.setup(ModelWeights(model, path), EOS, PAD)
    engine.update_weights(ModelWeights(model, path), version)
    return engine


def right(engine: VLLMEngine, model: Any) -> bool:
    groups = engine.generate(PROMPTS, SEEDS, Sampling(8))
    return worst_gap(model, PROMPTS, groups) < BOUND


@pytest.mark.usefixtures("group")
def test_engines_come_and_go_and_the_group_stays(tmp_path: Path) -> None:
    path, model = save_model("qwen2", tmp_path), make_model("qwen2", 0)
    torch.set_float32_matmul_precision("high")
    first = started(path, model)
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    assert right(first, model)
    del first  # dropped, not closed
    gc.collect()
    assert alive()
    second = started(path, model)
    assert right(second, model)
    other_path, other = save_model("qwen3-tied", tmp_path / "b"), make_model("qwen3-tied", 0)
    third = started(other_path, other)  # as `evaluate` does for its next model
    assert right(third, other) and alive()
    assert second.version is None
    with pytest.raises(TrainingStopped, match="vLLM has stopped"):
        second.generate([[5]], [[0]], Sampling(2))
    second.setup(ModelWeights(model, path), EOS, PAD)
    second.update_weights(ModelWeights(model, path), 1)
    assert right(second, model) and third.version is None
    second.close()
    second.close()
    assert alive()


def test_a_group_of_vllms_own_ends_with_it(tmp_path: Path) -> None:
    path, model = save_model("qwen2", tmp_path), make_model("qwen2", 0)
    engine = started(path, model)
    assert distributed.is_initialized()
    engine.close()
    assert not distributed.is_initialized()  # or Lightning would take the next run for distributed


@pytest.mark.usefixtures("group")
def test_a_failing_generate_leaves_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = save_model("qwen2", tmp_path), make_model("qwen2", 0)
    engine = started(path, model)
    engine.generate([[5]], [[0]], Sampling(4))
    monkeypatch.setattr("kdrl_lightning.engines.vllm.engine.check_requests", lambda *_: None)
    with pytest.raises(TrainingStopped, match=r"vLLM could not sample: .*index out of range"):
        engine.generate([[99]], [[0]], Sampling(4))
    gc.collect()
    assert alive()


def test_an_evaluation_in_inference_mode_leaves_an_engine_that_can_be_trained(
    tmp_path: Path,
) -> None:
    path, model = save_model("qwen2", tmp_path), make_model("qwen2", 0)
    engine = VLLMEngine(kv_cache_memory_bytes=16 << 20, max_model_len=64)
    engine.compared = False
    live = LiveSampler(cast(Any, None))
    live.trainer = cast(Any, SimpleNamespace(global_step=0, precision="32-true"))
    ends = SimpleNamespace(ids=(EOS,))
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    live.module = cast(Any, SimpleNamespace(end_tokens=ends, tokenizer=tokenizer))
    with torch.inference_mode():  # Lightning's default for validation
        live.sync(engine, ModelWeights(model, path))
        assert right(engine, model)
    new = make_model("qwen2", 7)
    live.trainer = cast(Any, SimpleNamespace(global_step=1, precision="32-true"))
    live.sync(engine, ModelWeights(new, path))
    assert right(engine, new) and not right(engine, model)
