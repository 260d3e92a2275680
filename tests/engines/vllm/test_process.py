"""What vLLM's start reads and changes in the process: a stand-in that records it, and real vLLM."""

from __future__ import annotations

import gc
import os
import random
import re
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.short_runs import make_data, make_module, make_trainer
from helpers.with_vllm.need import ROOT, need_vllm, run
from kdrl_lightning import GKD
from kdrl_lightning.engines import VLLMEngine
from kdrl_lightning.engines.vllm import process
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights

NAMES = (*process.LAUNCHER, *process.MEETING, process.IN_PROCESS, "SLURM_LOCALID")


class FakeLLM:
    """Writes down what a start finds, and disturbs the process as vLLM does."""

    starts: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **settings: Any) -> None:
        found = {name: os.environ.get(name) for name in NAMES}
        found["backend"] = settings["distributed_executor_backend"]
        self.starts.append(found)
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        torch.set_float32_matmul_precision("highest")
        if found["backend"] == "external_launcher":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        core = SimpleNamespace(shutdown=lambda: torch.distributed.destroy_process_group())
        self.llm_engine = SimpleNamespace(engine_core=core)

    def apply_model(self, function: Any) -> list[Any]:
        return [function(torch.nn.Linear(1, 1))]


class Devices:
    """The current GPU of a machine with several."""

    current = 0

    def set_device(self, index: int) -> None:
        self.current = index

    def device(self, index: int) -> Any:
        devices, before = self, self.current

        class Inside:
            def __enter__(self) -> None:
                devices.current = index

            def __exit__(self, *_: object) -> None:
                devices.current = before

        return Inside()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Devices]:
    vllm, made = ModuleType("vllm"), Devices()
    vllm.LLM = FakeLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device", made.device)
    monkeypatch.setattr(torch.cuda, "set_device", made.set_device)
    FakeLLM.starts = []
    yield made
    process.close_running()


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The GPUs whose random state is kept."""
    kept: list[Any] = []
    original = torch.random.fork_rng

    def forked(devices: Any = None) -> Any:
        kept.append(devices)
        return original(devices=[])

    monkeypatch.setattr(torch.random, "fork_rng", forked)
    return kept


def on(device: str, folder: str) -> ModelWeights:
    """Weights of a model on a device that this machine need not have."""
    model = load_causal_lm(folder)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = mode.from_tensor(parameter.detach()).to(device)
                    module._parameters[name] = torch.nn.Parameter(fake)
    return ModelWeights(model, folder)


LAUNCHERS: dict[str, dict[str, str]] = {
    "slurm": {"SLURM_LOCALID": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "12910"},
    "torchrun": {
        **{"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
        **{"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    },
    "none": {},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("index", [0, 1, 3])
def test_the_engine_is_on_the_ranks_own_gpu(
    gpus: Devices,
    fork: list[Any],
    student_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
    index: int,
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    before, gpus.current = dict(os.environ), 7
    VLLMEngine().setup(on(f"cuda:{index}", student_folder), 1, 0)
    (start,) = FakeLLM.starts
    assert start["backend"] == "external_launcher"
    # Alone: no process group exists, so vLLM makes one of this process.
    assert (start["LOCAL_RANK"], start["RANK"], start["WORLD_SIZE"]) == (str(index), "0", "1")
    assert start["MASTER_ADDR"] == "127.0.0.1" and int(start["MASTER_PORT"]) > 0
    assert start["TORCHELASTIC_USE_AGENT_STORE"] is None
    assert gpus.current == 7, "the current GPU is restored"
    assert fork == [[index]]
    known = {process.IN_PROCESS, *process.ENVIRONMENT}
    assert {k: v for k, v in os.environ.items() if k not in known} == {
        k: v for k, v in before.items() if k not in known
    }


def test_a_rank_of_a_group_names_its_device(
    gpus: Devices, fork: list[Any], student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 9)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", _must_not)
    for name, value in LAUNCHERS["slurm"].items():
        monkeypatch.setenv(name, value)
    engine = VLLMEngine()
    engine.setup(on("cuda:1", student_folder), 1, 0)
    (start,) = FakeLLM.starts
    assert (start["RANK"], start["LOCAL_RANK"]) == ("9", "1")
    assert start["MASTER_ADDR"] == "node1"  # the group's, which vLLM joins
    engine.close()


def _must_not(group: Any = None) -> None:
    raise AssertionError("the trainer's process group ends with the engine")


def test_a_cpu_alone_needs_no_launcher(gpus: Devices, student_folder: str) -> None:
    VLLMEngine().setup(ModelWeights(load_causal_lm(student_folder), student_folder), 1, 0)
    assert FakeLLM.starts[0]["backend"] is None


@pytest.mark.parametrize("value", ["1", "0", None])
def test_the_shells_choice_of_processes_is_overridden(
    gpus: Devices, student_folder: str, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is not None:
        monkeypatch.setenv(process.IN_PROCESS, value)
    VLLMEngine().setup(ModelWeights(load_causal_lm(student_folder), student_folder), 1, 0)
    assert FakeLLM.starts[0][process.IN_PROCESS] == "0"


def test_random_state_and_precision_stay(gpus: Devices, student_folder: str) -> None:
    weights = ModelWeights(load_causal_lm(student_folder), student_folder)
    torch.set_float32_matmul_precision("high")
    # Not the state after seed 0, which vLLM sets and a test starts with.
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(41)  # type: ignore[operator] # functions of no common type
    try:
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        VLLMEngine().setup(weights, 1, 0)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_precision_of_the_newer_interface_stays(gpus: Devices, student_folder: str) -> None:
    weights = ModelWeights(load_causal_lm(student_folder), student_folder)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        VLLMEngine().setup(weights, 1, 0)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_process_holds_one_engine(gpus: Devices, student_folder: str) -> None:
    weights = ModelWeights(load_causal_lm(student_folder), student_folder)
    first, second = VLLMEngine(), VLLMEngine()
    first.setup(weights, 1, 0)
    first.version = 0
    second.setup(weights, 1, 0)
    assert first.version is None and first._llm is None  # a sync starts it anew
    held = process.RunningEngine.current
    assert held is not None
    del second
    gc.collect()
    assert process.RunningEngine.current is None


def test_a_second_vllm_for_the_teacher_is_refused(
    gpus: Devices, tmp_path: Any, student_folder: str, teacher_folder: str
) -> None:
    engines = {"rollout_engine": VLLMEngine(), "teacher_engine": VLLMEngine()}
    data = make_data(teacher_completions=1, **engines)
    module = make_module(student_folder, teacher_folder, GKD())
    words = r"`teacher_completions.engine` must not be a second vLLM in this process: got VLLMEngin"
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(tmp_path).fit(module, datamodule=data)


def test_the_real_engine_in_a_process_with_a_group() -> None:
    need_vllm()
    cases = str(ROOT / "tests/engines/vllm/process_cases.py")
    out = run(
        ["pytest", "-n0", "-p", "no:cacheprovider", "-W", "default", "-q", cases],
        ROOT,
        timeout=200,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",  # as a shell may have it
    )
    assert out.returncode == 0, out.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", out.stdout)[1]) >= 4 and "skipped" not in out.stdout  # type: ignore[index]
