"""Runs the library's code on fake tensors, and counts its memory and floating-point operations.

Token ids, masks and lengths stay real tensors, because they decide shapes. Every floating-point
tensor is one of torch's fake tensors: it has a shape, a type and a size of storage, but no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Cost:
    """Memory and operations of a phase on one rank.

    Attributes:
        peak: bytes at the peak, above those held before.
        kept: bytes of activations that the forward pass keeps for the backward pass.
        flops: floating-point operations.
        whole: bytes of unreduced gradients of all parameters, above those of the rank's shard.
    """

    peak: int = 0
    kept: int = 0
    flops: int = 0
    whole: int = 0


@dataclass(frozen=True)
class Typical:
    """Operations for ``rows`` completions of mean length: to score them, and to train on them."""

    rows: int
    score: float
    update: float


class Meter(TorchDispatchMode):
    """Counts bytes of live tensors and their peak, and floating-point operations.

    Args:
        numbers: makes fake tensors, see ``without_numbers``; None: count real tensors.

    Attributes:
        bytes: size of all live storages that operations have made.
        peak: the largest value of ``bytes`` since ``restart``.
        flops: operations of matrix products and attention since ``restart``, two per
            multiplication. Causal attention counts half, as a flash kernel computes it.
    """

    # `Any` in this file: torch's types of operators, their arguments and results.

    def __init__(self, numbers: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = numbers
        self.bytes = self.peak = self.flops = 0
        self._held: dict[int, tuple[Any, int]] = {}  # by storage: a reference to it, and its bytes

    def restart(self) -> int:
        """Start to count peak and operations anew; return the bytes that are held now."""
        self.peak, self.flops = self.bytes, 0
        return self.bytes

    def count(self, storage: Any) -> None:
        """Count a storage; if it is counted already, count its new size."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._held:

            def freed(_: Any) -> None:
                self.bytes -= self._held.pop(key)[1]

            self._held[key] = (weakref.ref(storage, freed), 0)
        reference, before = self._held[key]
        self._held[key] = (reference, size)
        self.bytes += size - before
        self.peak = max(self.peak, self.bytes)

    def resized(self, storage: Any) -> None:
        """Count the new size of a storage, if the meter counts this storage."""
        if storage._cdata in self._held:
            self.count(storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count its results."""
        kwargs = kwargs or {}
        tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
        if any(isinstance(x, DTensor) for x in tensors):
            return NotImplemented  # torch calls again with this rank's shard
        out = self._run(func, tensors, args, kwargs)
        self.flops += flops_of(func, args, kwargs, out)
        for made in _tensors((out,)):
            self.count(made.untyped_storage())
        return out

    def _run(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        if self.numbers is None:
            return func(*args, **kwargs)
        if not any(isinstance(x, FakeTensor) for x in tensors):
            if tensors or not _makes_floats(func, args, kwargs):
                with _disable_current_modes():
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:  # `.item()` of an unknown number
            kind = tensors[0].dtype
            return True if kind == torch.bool else 0.0 if kind.is_floating_point else 0
        if func is aten.index.Tensor:
            args = (args[0], _as_places(args[1]))
        numbers = self.numbers
        if not all(isinstance(x, FakeTensor) for x in tensors):
            args, kwargs = tree_map_only(
                Tensor,
                lambda x: x if isinstance(x, FakeTensor) else numbers.from_tensor(x),
                (args, kwargs),
            )
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.is_floating_point():  # the common case, kept fast
            return out
        return tree_map_only(FakeTensor, _numbered, out)


@contextmanager
def without_numbers() -> Iterator[Meter]:
    """Make every new floating-point tensor a fake one, and yield the meter that counts them.

    A boolean read from a fake tensor is true, and a number is 0. Unknown integers (such as sampled
    tokens) become 0, 1, 2, ...
    """
    numbers = FakeTensorMode()
    meter = Meter(numbers)
    plain = torch.UntypedStorage.resize_

    def resize(storage: Any, size: int) -> Any:
        out = plain(storage, size)
        meter.resized(storage)
        return out

    # FSDP2 frees and refills gathered weights by resizing their storage, which is no operation.
    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
    try:
        with numbers, meter:
            yield meter
    finally:
        torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operation's arguments; far faster than torch's ``tree_map``."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the floating-point operations of a matrix product or attention; 0 for the rest."""
    packet = func._overloadpacket
    if packet is FLASH:
        query, key, value = args[:3]
        causal = kwargs.get("is_causal", args[4] if len(args) > 4 else False)
        every = sdpa_flop_count(query.shape, key.shape, value.shape)
        return _seen(causal, key, every)
    if packet is FLASH_BACKWARD:
        gradient, query, key, value = args[:4]
        every = sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)
        return _seen(args[7], key, every)
    count = _counts(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


@cache
def _counts(packet: Any) -> Any:
    """Return torch's rule to count an operator or its in-place form; None if it has none."""
    name = packet.__name__
    inplace = name.endswith("_") and not name.startswith("_")
    return flop_registry.get(getattr(aten, name[:-1], packet) if inplace else packet)


def _numbered(made: Tensor) -> Tensor:
    if made.is_floating_point() or made.dtype == torch.bool or made.is_complex():
        return made
    with _disable_current_modes():
        return torch.arange(made.numel(), dtype=made.dtype).view(made.shape)


def _makes_floats(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a function without tensor arguments makes a floating-point tensor."""
    if func._overloadpacket in (aten.scalar_tensor, aten.randint, aten.randperm):
        return False
    kind = kwargs.get("dtype")
    if kind is not None:
        return bool(kind.is_floating_point)
    if func._overloadpacket in (aten.arange, aten.full):  # their type follows from the numbers
        numbers = args if func._overloadpacket is aten.arange else args[1:2]
        return any(isinstance(x, float) for x in numbers)
    return True


def _seen(causal: bool, key: Tensor, every: int) -> int:
    """Return how many operations of full attention a kernel computes: about half if causal."""
    length = int(key.shape[-2])
    return every * (length + 1) // (2 * length) if causal else every


def _as_places(indices: Any) -> list[Any]:
    """Replace masks by the positions of their true entries, because these decide a shape."""
    places: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            with _disable_current_modes():
                places += list(index.nonzero(as_tuple=True))
        else:
            places.append(index)
    return places
