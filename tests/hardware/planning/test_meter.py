"""The meter counts what torch allocates, for real and for fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from kdrl_lightning.hardware.planning.rehearsal.meter import Meter, without_numbers

N = 64


def test_a_freed_tensor_counts_at_the_peak_only() -> None:
    with Meter() as meter:
        first = torch.zeros(N, N)
        _ = first + 1
        view = first[3:].t()
        del _
        first.resize_(N, N)
    assert (meter.bytes, meter.peak) == (4 * N * N, 8 * N * N)
    del view, first
    assert meter.bytes == 0


def test_without_numbers_it_counts_the_same() -> None:
    sizes = []
    for mode in (Meter(), without_numbers()):
        with mode as meter:
            model = nn.Sequential(nn.Linear(N, 3 * N), nn.GELU(), nn.Linear(3 * N, N))
            before = meter.restart()
            model(torch.ones(5, N)).sum().backward()
            sizes.append((before, meter.peak, meter.flops))
    assert sizes[0] == sizes[1]


def test_operations_are_those_of_torch_and_half_of_causal_attention() -> None:
    weight = torch.ones(N, N, requires_grad=True)
    with FlopCounterMode(display=False) as torchs, Meter() as meter:
        (torch.ones(7, N) @ weight).sum().backward()
    assert meter.flops == torchs.get_total_flops() > 0
    with Meter() as meter:
        torch.zeros(N, N).addmm_(torch.ones(N, 7), torch.ones(7, N))
    assert meter.flops == 2 * N * 7 * N
    heads = torch.ones(2, 3, N, 16)
    counts = []
    for causal in (False, True):
        with Meter() as meter:
            nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=causal)
        counts.append(meter.flops)
    assert counts[0] == 2 * 3 * (2 * N * N * 16) * 2
    assert counts[1] / counts[0] == pytest.approx((N + 1) / (2 * N), abs=1e-3)


def test_integers_are_real_and_decide_shapes() -> None:
    with without_numbers():
        mask = torch.arange(6) % 2 == 0
        values = torch.zeros(6, 4)
        assert isinstance(values, FakeTensor) and not isinstance(mask, FakeTensor)
        assert values[mask].shape == (3, 4)
        assert torch.randint(9, (4,)).max() < 9
        # Nobody knows which column is largest: any integers will do.
        assert not isinstance(values.argmax(-1), FakeTensor)
        assert float(values.sum()) == 0.0 and bool((values > 1).any())


def test_a_storage_that_is_emptied_counts_no_more() -> None:
    with without_numbers() as meter:
        table = torch.zeros(N, N)
        table.untyped_storage().resize_(0)
        assert meter.bytes == 0
        table.untyped_storage().resize_(4 * N * N)
        assert meter.bytes == 4 * N * N
