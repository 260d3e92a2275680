"""Steps that vLLM's weight reload skips on a CPU, with stand-ins for its modules."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kdrl_lightning.engines.vllm.worker import StudentWorker, after_reload, before_reload


class Packing:
    """Remembers which modules it packed; has a kernel of experts."""

    def __init__(self, experts: type) -> None:
        self.packed: list[Any] = []
        self.moe_kernel: Any = SimpleNamespace(fused_experts=experts())

    def process_weights_after_loading(self, module: Any) -> None:
        self.packed.append(module)


class CPUUnquantizedExperts:
    """Named as vLLM's."""


class TritonExperts:
    """Those of a GPU copy into their kernel by themselves."""


def model(experts: type = CPUUnquantizedExperts) -> nn.Module:
    made = nn.ModuleDict({n: nn.Linear(4, 4, bias=False) for n in ("embed", "head", "other")})
    made["head"].weight = made["embed"].weight
    for module in made.values():
        module.quant_method = Packing(experts)  # type: ignore[assignment]
    return made


def packed(made: Any) -> list[str]:
    return [name for name in made if made[name].quant_method.packed]


def test_kernels_of_experts_on_a_cpu_are_made_anew() -> None:
    ours, theirs = model(), model(TritonExperts)
    for made in (ours, theirs):
        before_reload(made)
    kernels = [[m.quant_method.moe_kernel is None for m in x.children()] for x in (ours, theirs)]
    assert kernels == [[True] * 3, [False] * 3]


def test_a_partial_function_that_loads_a_weight_gets_a_name() -> None:
    def load(scale: float, parameter: Any, weight: Any) -> None: ...

    made = model()
    parameters: list[Any] = list(made.parameters())
    parameters[0].weight_loader, parameters[1].weight_loader = partial(load, 2.0), load
    before_reload(made)
    assert [p.weight_loader.__name__ for p in parameters[:2]] == ["load", "load"]


def test_tied_weights_are_packed_again() -> None:
    made = model()
    after_reload(made)
    assert packed(made) == ["embed", "head"]
    elsewhere = model().to("meta")
    elsewhere["head"].weight = elsewhere["embed"].weight  # type: ignore[index]
    after_reload(elsewhere)  # as on a GPU, where both share their memory
    assert packed(elsewhere) == []


@pytest.mark.parametrize("label", ["", "4-abc"])
def test_a_transfer_is_begun_and_ended_like_a_reload(label: str) -> None:
    made = model()
    worker = SimpleNamespace(get_model=lambda: made)
    assert StudentWorker.name_student(worker, label) == {"label": label}
    assert worker.student_label == label
    fresh = [m.quant_method.moe_kernel is None for m in made.children()]
    assert fresh == [not label] * 3
    assert packed(made) == (["embed", "head"] if label else [])
    assert torch.equal(made["head"].weight, made["embed"].weight)  # type: ignore[index]


class CPURouter:
    """Named as vLLM's, with what it reads."""

    def __init__(self, bias: torch.Tensor | None, scoring: str = "softmax", grouped: bool = False):
        self.e_score_correction_bias, self.scoring_func = bias, scoring
        self.use_grouped_topk = grouped
        self.custom_routing_function: Any = None
        self.num_expert_group, self.topk_group = (4, 2) if grouped else (None, None)


@pytest.mark.parametrize(
    ("router", "groups"),
    [
        (CPURouter(torch.ones(4)), (True, 1, 1)),
        (CPURouter(None), (False, None, None)),
        (CPURouter(None, "sigmoid"), (True, 1, 1)),
        (CPURouter(torch.ones(4), "sigmoid"), (True, 1, 1)),
        (CPURouter(torch.ones(4), "sqrtsoftplus"), (False, None, None)),  # it knows the bias
        (CPURouter(torch.ones(8), grouped=True), (True, 4, 2)),
        (type("FusedTopKBiasRouter", (CPURouter,), {})(torch.ones(4)), (False, None, None)),
    ],
)
def test_a_cpus_router_without_groups_gets_one_for_its_bias_and_for_sigmoids(
    router: Any, groups: tuple[bool, int | None, int | None]
) -> None:
    experts: Any = nn.Linear(1, 1)
    experts.router = router
    before_reload(nn.ModuleList([experts]))
    got = router.use_grouped_topk, router.num_expert_group, router.topk_group
    assert got == groups
