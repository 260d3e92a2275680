"""What an engine checks and refuses before anything is loaded, and what a weight push costs."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO, EvalSet
from kdrl_lightning.engines import VLLMEngine, VLLMServerEngine
from kdrl_lightning.engines.vllm import engine as starting
from kdrl_lightning.engines.vllm import process, room
from kdrl_lightning.engines.vllm import server as servers
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models import weights as reading
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.tiny import ColumnAddition

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


class StartedError(Exception):
    """The settings of a start, which goes no further."""


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The settings with which vLLM is started."""
    seen: list[dict[str, Any]] = []

    def start(**settings: Any) -> None:
        seen.append(settings)
        raise StartedError

    module = ModuleType("vllm")
    module.LLM = start  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    yield seen
    process.close_running()


def lengths(prompts: ColumnAddition, tokenizer: Any) -> int:
    return max(len(tokenizer.encode(row["prompt"])) for row in prompts)  # type: ignore[attr-defined]


@pytest.mark.parametrize("evaluated", [4, 30])
def test_the_longest_row_of_the_run_is_the_engines_limit(
    tmp_path: Path, student_folder: str, vllm: list[dict[str, Any]], evaluated: int
) -> None:
    module, trainer = make_module(student_folder, None, GRPO()), make_trainer(tmp_path)
    sets = {"few": EvalSet(ColumnAddition(4, seed=2), max_tokens=evaluated)}
    data = make_data(rollout_engine=VLLMEngine(), val_prompts=sets, max_tokens=10)
    with pytest.raises(ConfigurationError, match="must be an engine that can run"):
        trainer.fit(module, datamodule=data)
    longest = max(len(ids) for _, ids in data.rollouts.prompts)
    assert vllm[0]["max_model_len"] == longest + max(10, evaluated)
    assert vllm[0]["max_model_len"] < module.context_length / 2


def test_prompts_that_are_not_checked_may_have_the_longest_length(
    tmp_path: Path,
    student_folder: str,
    vllm: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdrl_lightning.datamodule.rollouts.CHECKED_ROWS", 5)
    module, trainer = make_module(student_folder, None, GRPO()), make_trainer(tmp_path)
    data = make_data(
        rollout_engine=VLLMEngine(), val_prompts=None, max_tokens=10, max_prompt_tokens=21
    )
    with pytest.raises(ConfigurationError, match="must be an engine that can run"):
        trainer.fit(module, datamodule=data)
    assert vllm[0]["max_model_len"] == 31


def test_a_given_limit_stays(student_folder: str, vllm: list[dict[str, Any]]) -> None:
    engine = VLLMEngine(max_model_len=40)
    engine.prepare(student_folder, 20, CPU)
    with pytest.raises(ConfigurationError):
        engine.setup(ModelWeights(load_causal_lm(student_folder), student_folder), 1, 0)
    assert vllm[0]["max_model_len"] == 40


def test_sequences_at_once_follow_from_the_device(
    student_folder: str, vllm: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = ModelWeights(load_causal_lm(student_folder), student_folder)
    for most, expected in ((None, 256), (7, 7)):
        with pytest.raises(ConfigurationError):
            VLLMEngine(max_sequences=most).setup(weights, 1, 0)
        assert vllm.pop()["max_num_seqs"] == expected
    monkeypatch.setattr(starting, "undisturbed", lambda _: nullcontext("external_launcher"))
    for most in (None, 7):
        engine = VLLMEngine(max_sequences=most)
        engine._options, engine.dtype, engine.context = {}, torch.bfloat16, 40
        with pytest.raises(ConfigurationError):
            engine._start(student_folder, GPU)
        # vLLM knows its numbers for the GPU.
        settings = vllm.pop()
        assert settings.get("max_num_seqs") == most
        assert settings["kv_cache_memory_bytes"] is None and not settings["enforce_eager"]


def test_requests_at_once_follow_from_the_students_device(
    student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = ModelWeights(load_causal_lm(student_folder), student_folder)
    monkeypatch.setattr(VLLMServerEngine, "_check", lambda *_: None)
    engine = VLLMServerEngine(["http://127.0.0.1:9"])
    engine.setup(weights, 1, 0)
    assert engine._at_once == servers.AT_ONCE["cpu"] == 128
    monkeypatch.setitem(servers.AT_ONCE, "cpu", 512)
    engine.setup(weights, 1, 0)
    assert engine._at_once == 512
    given = VLLMServerEngine(["http://127.0.0.1:9"], max_sequences=3)
    given.setup(weights, 1, 0)
    assert given._at_once == 3


def test_a_share_without_room_is_refused_before_the_model_is_loaded(
    tmp_path: Path,
    student_folder: str,
    vllm: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 80_000_000_000))
    monkeypatch.setattr(room, "needed_bytes", lambda *_: 17_100_000_000)
    words = (
        r"`gpu_memory_utilization` must give the engine 17.1 GB, for the weights of .+ and the "
        r"cache of a row of 2348 tokens: got 0.1, which is 8 of 80 GB. Set at least 0.22, or sample"
    )
    with pytest.raises(ConfigurationError, match=words):
        VLLMEngine(gpu_memory_utilization=0.1).prepare(student_folder, 2348, GPU)
    VLLMEngine(gpu_memory_utilization=0.22).prepare(student_folder, 2348, GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 16_000_000_000))
    with pytest.raises(ConfigurationError, match=r"This GPU is too small: sample on another GPU"):
        VLLMEngine(gpu_memory_utilization=1.0).prepare(student_folder, 2348, GPU)


def test_the_needed_bytes_are_those_of_weights_and_one_row(student_folder: str) -> None:
    model = load_causal_lm(student_folder)
    weights = sum(p.nbytes for p in model.parameters()) // 2
    config = model.config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    row = 100 * 2 * config.num_hidden_layers * heads * 2
    assert room.needed_bytes(student_folder, torch.bfloat16, 100, None) == weights + row
    assert room.needed_bytes(student_folder, torch.bfloat16, 100, 5) == weights + 5


def test_sleep_on_a_cpu_is_refused_before_the_model_is_loaded(
    tmp_path: Path,
    student_folder: str,
    vllm: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = VLLMEngine(sleep=True)  # this machine has a GPU, but the run is on the CPU
    monkeypatch.undo()
    module = make_module(student_folder, None, GRPO())
    monkeypatch.setattr(type(module), "configure_model", lambda self: pytest.fail("loaded"))
    data = make_data(rollout_engine=engine)
    with pytest.raises(ConfigurationError, match=r"`sleep` must be false for a student on a CPU"):
        make_trainer(tmp_path).fit(module, datamodule=data)


def test_pushes_are_in_the_engines_type_and_hold_one_tensor(
    student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(student_folder)
    _, large, *_ = sorted({p.numel() for p in model.parameters() if p.dim() > 1})
    monkeypatch.setattr(reading, "LARGE", large)
    hub = HubWeights(ModelWeights(model, student_folder), torch.bfloat16)
    described = {name: (dtype, shape) for name, dtype, shape in hub.described()}
    largest = max(p.numel() for p in model.parameters()) * 2
    alive: list[weakref.ref[torch.Tensor]] = []
    for name, tensor in hub.tensors():
        own = model.get_parameter(name)
        narrow = own.dim() > 1 and own.numel() >= large
        assert tensor.dtype == (torch.bfloat16 if narrow else torch.float32), name
        assert described[name] == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(tensor, own.to(tensor.dtype))
        if narrow:
            alive.append(weakref.ref(tensor))
        held = [t for r in alive if (t := r()) is not None and t is not tensor]
        assert sum(t.nbytes for t in held) + tensor.nbytes <= 2 * largest
        del held
    assert any(dtype == torch.bfloat16 for dtype, _ in described.values())
    plain = dict(HubWeights(ModelWeights(model, student_folder), torch.float32).tensors())
    assert all(t.dtype == torch.float32 for t in plain.values())
