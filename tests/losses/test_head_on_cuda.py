"""The head on a GPU, simulated by fake tensors: chunk sizes, dtypes of the matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdrl_lightning.losses import (
    TokenScores,
    logprobs,
    reverse_kl,
    token_scores,
)
from kdrl_lightning.losses.head import head_products
from kdrl_lightning.losses.head.chunk_math import GPU_LOGITS, plain_math
from kdrl_lightning.losses.logprobs import Head, Other, auto_chunk_size, pays_ahead

N, H, V = 2000, 64, 151_936


class Calls(TorchDispatchMode):
    """Keeps the names of operations, and the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def loss(scores: TokenScores) -> Tensor:
    assert scores.entropy is not None and scores.divergence is not None
    return (scores.logprobs + scores.entropy + scores.divergence).sum()


@pytest.mark.parametrize("known", [None, loss])
def test_a_pass_sums_its_products_in_float32(monkeypatch: pytest.MonkeyPatch, known: Any) -> None:
    # Without a GPU torch cannot index a fake tensor there, so these are on the CPU.
    monkeypatch.setattr(head_products, "sums_wide", lambda left: left.dtype == torch.bfloat16)
    monkeypatch.setattr(logprobs, "math_for", lambda _: plain_math(GPU_LOGITS))

    def make(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16).requires_grad_()

    size = auto_chunk_size(V, "cuda")
    with FakeTensorMode(), Calls() as calls:
        hidden, weight, bias = make(N, H), make(V, H), make(V)
        theirs = Other(make(N, H), Head(make(V, H)), scored=True)
        scores = token_scores(
            hidden,
            Head(weight, bias),
            torch.zeros(N, dtype=torch.long),
            0.7,
            size,
            other=theirs,
            divergence=reverse_kl,
            loss=known,
        )
        loss(scores).backward()
    assert scores.logprobs.dtype == torch.float32
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
    # Two chunks: the logits of both models, twice if the loss is not known.
    times = 2 if known else 4
    assert calls.names.count("aten.mm.dtype_out") == calls.names.count("aten.mm.dtype") == times
    # The gradients of states and weight.
    assert calls.names.count("aten.mm.default") == calls.names.count("aten.addmm.dtype_out") == 2
    assert "aten._local_scalar_dense.default" not in calls.names  # the host waits for nothing
    assert calls.largest == size * V


def test_a_chunk_on_cuda_has_a_gibibyte_and_no_other_limit() -> None:
    assert auto_chunk_size(V, "cuda") == (1 << 28) // V
    assert auto_chunk_size(2, "cuda") == 1 << 27
    assert auto_chunk_size(1 << 30, "cuda") == 1


@pytest.mark.parametrize(
    ("device", "rows", "width", "pays"),
    [("cpu", 16, 320, False), ("cpu", 4096, 320, True), ("cuda", 4096, 256, False),
     ("cuda", 4096, 1024, True)],
)  # fmt: skip
def test_a_loss_is_computed_ahead_where_the_product_is_large(
    device: str, rows: int, width: int, pays: bool
) -> None:
    with FakeTensorMode():
        hidden = torch.empty(rows, width, device=device)
        weight = torch.empty(V if device == "cuda" else 50_257, width, device=device)
        assert pays_ahead(hidden, Head(weight), None) == pays
