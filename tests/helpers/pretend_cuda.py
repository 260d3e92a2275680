"""A pretended GPU: tensors that report ``cuda:0``, with their numbers on the CPU.

The library's tensor code runs on it as on a card, with the CPU's numbers. Mixing devices raises as
CUDA does, and what makes the host wait for the card is counted. torch's own fake tensors have no
numbers, so code that reads one (lengths, masks, end tokens) could not run on them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
ON_CARD = ("cuda", "meta")
# On CUDA the host waits for these: their result is a number, or a shape that depends on data.
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.equal.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
# CUDA's products of 16-bit matrices with a float32 result.
WIDE_PRODUCTS = {
    aten.mm.dtype: aten.mm.default,
    aten.mm.dtype_out: aten.mm.out,
    aten.addmm.dtype: aten.addmm.default,
    aten.addmm.dtype_out: aten.addmm.out,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


# What autocast on CUDA computes in 16 bits, and what in float32.
NARROW = {
    *(F.linear, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.addmm),
    *(torch.baddbmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm),
}
WIDE = {
    *(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.exp, torch.log, torch.pow),
    *(torch.rsqrt, torch.sum, torch.cumsum, torch.Tensor.softmax, torch.Tensor.log_softmax),
    *(torch.Tensor.exp, torch.Tensor.log, torch.Tensor.pow, torch.Tensor.sum, torch.Tensor.cumsum),
}


class MixedDevicesError(RuntimeError):
    """An operation has tensors of both devices."""


class Card(torch.Tensor):
    """A tensor on the pretended GPU."""

    inner: torch.Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Card:
        made: Card = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",  # for C++, whose CPU build has no code for CUDA tensors
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Card({self.inner})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save the numbers, for which the host waits."""
        _waited("saved")
        return self.inner.__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


waits: Counter[str] = Counter()


def _waited(name: str) -> None:
    """Count a wait; one that transformers' code causes is counted as ``transformers``."""
    frame = sys._getframe(1)
    while frame is not None and "kdrl_lightning/" not in frame.f_code.co_filename:
        if "/transformers/" in frame.f_code.co_filename:
            name = "transformers"
            break
        frame = frame.f_back  # type: ignore[assignment]
    waits[name] += 1


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the numbers inside, under CUDA's rules."""
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    cards = [x for x in flat if isinstance(x, Card)]
    plain = [x for x in flat if not isinstance(x, Card)]
    name = func._overloadpacket.__name__
    if func is aten.copy_.default:
        later = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if cards and plain and (isinstance(args[1], Card) or not later):
            _waited(name)
    elif cards and any(x.dim() > 0 for x in plain):
        shapes = [(tuple(x.shape), "cuda" if isinstance(x, Card) else "cpu") for x in flat]
        raise MixedDevicesError(f"{name}: {shapes}")
    target = kwargs.get("device")
    on_card = bool(cards) if target is None else torch.device(target).type in ON_CARD
    if cards and not on_card:
        _waited(name)
    if cards and func in WAITS and kwargs.get("output_size") is None:
        _waited(name)
    if func in INDEXING and any(
        isinstance(i, Card) and i.dtype == torch.bool for i in args[1] if i is not None
    ):
        _waited(f"{name} by a mask")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = {id(x.inner): x for x in cards}
    args, kwargs = tree_map_only(Card, lambda x: x.inner, (args, kwargs))
    if func in WIDE_PRODUCTS:
        *args, kind = args
        func, args = WIDE_PRODUCTS[func], tree_map_only(torch.Tensor, lambda x: x.to(kind), args)
    out = func(*args, **kwargs)
    if not on_card:
        return out

    def wrap(x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, Card):
            return x
        return inner[id(x)] if id(x) in inner else Card(x)

    return tree_map_only(torch.Tensor, wrap, out)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


class _Move(torch.autograd.Function):
    """Copy to the pretended GPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return Card(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient.cpu()


class _Functions(TorchFunctionMode):
    """Makes tensors for ``device="cuda"`` without CUDA's start, which a build for CPUs refuses."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_autocast_enabled("cuda") and (func in NARROW or func in WIDE):
            kind = torch.get_autocast_dtype("cuda") if func in NARROW else torch.float32
            args, kwargs = tree_map_only(Card, lambda x: _cast(x, kind), (args, kwargs))
        if func is torch.Tensor.backward:
            with self:  # a handler's mode is off while it runs
                return _engine_run_backward(
                    (args[0],),
                    (torch.ones_like(args[0]),),
                    kwargs.get("retain_graph") or False,
                    kwargs.get("create_graph") or False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        if func is torch.Tensor.tolist and isinstance(args[0], Card):
            return args[0].cpu().tolist()
        if func is torch.Tensor.new_tensor and isinstance(args[0], Card):
            _waited("upload")
            kwargs.setdefault("dtype", args[0].dtype)
            return to_card(torch.tensor(*args[1:], **{**kwargs, "device": "cpu"}))
        if func == torch.Tensor.data.__set__:
            return _set_data(*args)
        if func is torch.Tensor.cuda:
            return to_card(args[0])
        if func is torch.Tensor.pin_memory:
            return args[0]
        place = kwargs.get("device")
        if func is torch.Tensor.to:
            given = [a for a in args[1:] if isinstance(a, torch.device | str)]
            place = place if place is not None else (given[0] if given else None)
            others = tuple(a for a in args[1:] if isinstance(a, torch.Tensor))
            if others and isinstance(others[0], Card):
                place = CUDA
            if place is not None and torch.device(place).type == "cuda":
                rest = [a for a in args[1:] if isinstance(a, torch.dtype)]
                rest += [o.dtype for o in others]
                if not isinstance(args[0], Card) and not kwargs.get("non_blocking"):
                    _waited("upload")  # from memory that is not pinned
                moved = to_card(args[0])
                kind = kwargs.get("dtype") or (rest[0] if rest else None)
                return moved if kind is None else func(moved, kind)
            return func(*args, **kwargs)
        if place is not None and torch.device(place).type == "cuda" and func is not torch.device:
            kwargs["device"] = "cpu"
            if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Card):
                _waited("upload")
            args = tree_map_only(Card, lambda x: x.inner, args)
            return tree_map_only(torch.Tensor, to_card, func(*args, **kwargs))
        return func(*args, **kwargs)


def _cast(x: Card, kind: torch.dtype) -> torch.Tensor:
    """Cast as autocast does, which leaves integers and float64 alone."""
    return x.to(kind) if x.is_floating_point() and x.dtype != torch.float64 else x


def to_card(x: Any) -> Any:
    """Return a tensor, or a module, on the pretended GPU."""
    if isinstance(x, torch.nn.Module):
        for module in x.modules():
            for parameter in module.parameters(recurse=False):
                _set_data(parameter, to_card(parameter.detach()))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = to_card(buffer)
        return x
    return x if isinstance(x, Card) else _Move.apply(x)  # type: ignore[no-untyped-call]


def _set_data(target: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor the contents of another, which may be on the other device.

    The tensor stays the same object, as on a real GPU: whoever refers to it sees it move.
    """
    if isinstance(target, Card) and isinstance(value, Card):
        torch.Tensor.data.__set__(target, value)  # type: ignore[attr-defined]
        target.inner = value.inner
    elif isinstance(target, Card) or isinstance(value, Card):
        made = value.detach()
        if getattr(target, "_is_param", isinstance(target, torch.nn.Parameter)):
            made = torch.nn.Parameter(made, target.requires_grad)
        torch.utils.swap_tensors(target, made)
    else:
        torch.Tensor.data.__set__(target, value)  # type: ignore[attr-defined]


@contextmanager
def pretend_cuda() -> Iterator[Counter[str]]:
    """Pretend that there is a GPU; yield the number of the host's waits by operation."""
    waits.clear()
    with (
        # `Module.to` moves parameters in place, as with a real GPU.
        patch.object(torch.__future__, "get_swap_module_params_on_conversion", lambda: True),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
        patch.object(torch.cuda, "synchronize", lambda *_: waits.update(["synchronize"])),
        patch.object(torch.cuda, "mem_get_info", lambda *_: (8 << 30, 16 << 30)),
        _Functions(),
        _Dispatch(),
    ):
        yield waits
