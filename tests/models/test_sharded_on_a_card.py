"""Weights sharded over four simulated GPUs are gathered for an engine and for an export.

torch's fake tensors report ``cuda`` and hold no numbers; the process group is torch's fake one. An
operation that mixes devices or reads a number raises. Numbers are compared in a real process
group, in tests/models/test_sharding.py and tests/runs/test_two_processes.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from kdrl_lightning import LoRA
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.models import weights as reading
from kdrl_lightning.models.weights import ModelWeights

RANKS = 4
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
LARGEST = 256 * 32  # embedding and head


class Leaves(TorchDispatchMode):
    """Counts the copies from the GPU to the CPU, for which the host waits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = tree_leaves((args, kwargs or {}))
        if any(isinstance(x, DTensor) for x in values):
            return NotImplemented  # it comes again with the part of this rank
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            self.waits += any(isinstance(x, torch.Tensor) and x.is_cuda for x in values)
        return out


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of all gathered tensors that are alive, after each gather."""
    made: list[weakref.ref[torch.Tensor]] = []
    bytes_: list[int] = []
    gather = reading.full_tensor

    def gathered(part: torch.Tensor) -> torch.Tensor:
        whole = gather(part)
        made.append(weakref.ref(whole))
        bytes_.append(sum(x.nbytes for x in (one() for one in made) if x is not None))
        return whole

    monkeypatch.setattr(reading, "full_tensor", gathered)
    return bytes_


class _FirstCard(TorchFunctionMode):
    """A build for CPUs does not know which GPU is the current one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to:
            args = tuple("cuda:0" if isinstance(a, str) and a == "cuda" else a for a in args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cuda", (RANKS,))
    dist.destroy_process_group()


@contextmanager
def sharded(mesh: DeviceMesh, lora: LoRA | None = None, on: str = "cuda:0") -> Iterator[Any]:
    """Yield a model whose rows lie over the ranks, and what counts waits."""
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL))
    if lora is not None:
        lora.inject(model, 0)
    with _FirstCard(), FakeTensorMode(), Leaves() as leaves:
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                rows = -(-p.shape[0] // RANKS)
                here = torch.empty(rows, *p.shape[1:], dtype=p.dtype, device=on)
                spread = DTensor.from_local(
                    here, mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride()
                )
                setattr(module, name, nn.Parameter(spread, requires_grad=p.requires_grad))
        yield model, leaves


@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
@pytest.mark.parametrize("on", ["cuda:0", "cpu"], ids=["on-card", "offloaded"])
def test_an_engine_gets_whole_tensors_on_the_card_one_at_a_time(
    mesh: DeviceMesh,
    monkeypatch: pytest.MonkeyPatch,
    gathered: list[int],
    lora: LoRA | None,
    on: str,
) -> None:
    monkeypatch.setattr(reading, "LARGE", 1 << 12)
    with sharded(mesh, lora, on) as (model, leaves):
        weights, names = ModelWeights(model, "student"), []
        assert weights.sharded
        for name, tensor in HubWeights(weights, torch.bfloat16).tensors():
            assert tensor.device.type == "cuda" and not isinstance(tensor, DTensor), name
            assert tensor.dtype == (torch.bfloat16 if tensor.numel() >= 1 << 12 else torch.float32)
            names.append(name)
            del tensor
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(names)
        assert not leaves.waits
    # In the engine's type. A matrix with an adapter is whole in float32, with both factors.
    largest = LARGEST * 2 if lora is None else 64 * 32 * 4 + 4 * (64 + 32) * 4
    assert max(gathered) == max(LARGEST * 2, largest)


def test_weights_are_gathered_for_an_export_on_the_rank_that_writes(
    mesh: DeviceMesh, gathered: list[int]
) -> None:
    with sharded(mesh) as (model, leaves):
        weights = ModelWeights(model, "student")
        state = weights.state(keeps=True)
        assert {t.device.type for t in state.values()} == {"cpu"}
        assert leaves.waits == len(state)  # one per tensor
        leaves.waits = 0
        assert not any(t.numel() for t in weights.state(keeps=False).values())
        assert not leaves.waits
    assert max(gathered) == LARGEST * 4


def test_a_gathered_tensor_and_one_of_the_host_do_not_mix(mesh: DeviceMesh) -> None:
    with sharded(mesh) as (model, _):
        name, whole = next(iter(ModelWeights(model, "student").named_tensors()))
        with pytest.raises(RuntimeError, match=r"at least two devices, cuda:0 and cpu"):
            whole + torch.ones(whole.shape)
        assert name == "model.embed_tokens.weight"
