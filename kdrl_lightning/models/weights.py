"""Read access to a model's weights, for engines, export and fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.models.loading import save_causal_lm
from kdrl_lightning.models.lora import (
    ADAPTER,
    adapted_layers,
    add_update,
    base_order,
    is_adapter,
)

# `Any`: layers with adapters have no common type.

# We cast tensors of at least this many values for an engine: routers have fewer, and the other
# matrices of any model for which casting pays have more.
LARGE = 1 << 20


@dataclass(frozen=True)
class ModelWeights:
    """Reads the weights of a model, whole and under their Hugging Face names.

    Attributes:
        model: the live transformers model; an engine in this process may sample from it directly.
        path: the folder or hub name that it was loaded from.
        merged: add adapters to the weights that they adapt; else adapters are left out.
        end_token_ids: a teacher's end tokens; None: the student's.
        vocab_size: number of rows to sample from, if a teacher has more or fewer than the student;
            else None.
        compute_dtype: dtype in which the trainer computes; None: the weights' dtype.
    """

    model: HFModel
    path: str
    merged: bool = True
    end_token_ids: tuple[int, ...] | None = None
    vocab_size: int | None = None
    compute_dtype: torch.dtype | None = None

    @property
    def narrower(self) -> bool:
        """Whether the trainer computes in fewer bits than the weights have."""
        kept = self.model.dtype
        return self.compute_dtype is not None and self.compute_dtype.itemsize < kept.itemsize

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a shard; all ranks must then read together."""
        return any(isinstance(p, DTensor) for p in self.model.parameters())

    def named_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield Hugging Face names and weights, one at a time; tied weights under each name.

        With ``dtype``, large weights are cast to it, see ``narrowed``.

        A sharded weight is gathered on every rank and stays for as long as the caller keeps it.
        Every rank must then iterate to the end, even if it does not need the weights.
        """
        layers = adapted_layers(self.model)
        for name, tensor in self._base():
            yield plain_name(name), self._whole(name, tensor, layers, dtype)

    def _base(self) -> list[tuple[str, Tensor]]:
        """Return the weights without adapters, in the order of the plain model."""
        every, order = self.model.named_parameters(remove_duplicate=False), base_order(self.model)
        base = [(name, tensor) for name, tensor in every if not is_adapter(name)]
        return sorted(base, key=lambda item: order.get(plain_name(item[0]), 0))

    def stored(
        self, dtype: torch.dtype | None = None
    ) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
        """Return, by name, each weight and stored buffer with a function that reads it whole.

        The tensor is as this rank holds it. Calling the function for a sharded one is a collective.

        Args:
            dtype: dtype of what the functions return, see ``narrowed``; None: as it is stored.
        """
        layers = adapted_layers(self.model)
        return {
            plain_name(name): (tensor, partial(self._whole, name, tensor, layers, dtype))
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if not is_adapter(name)
        }

    def save(self, path: str, writes: bool = True) -> None:
        """Write a Hugging Face folder; all ranks must call it if the model is sharded.

        Args:
            path: path of the folder.
            writes: True on the one rank that writes; only it holds all weights, on the CPU.
        """
        write = self.writer(writes)
        if writes:
            write(path)

    def writer(self, writes: bool = True) -> Callable[[str], None]:
        """Gather the weights now and return a function that writes them to a folder later.

        That function has no collectives: if the disk fails on the writing rank, no other rank waits
        for it.

        Args:
            writes: True on the rank that will write.
        """
        gathers = self.sharded or (writes and bool(adapted_layers(self.model)))
        state = self.state(writes) if gathers else None
        return lambda path: save_causal_lm(self.model, path, state)

    def state(self, keeps: bool = True) -> dict[str, Tensor]:
        """Return weights and stored buffers, gathered on the CPU; a collective if sharded.

        Args:
            keeps: True on the ranks that need them; other ranks get empty tensors.
        """
        layers = adapted_layers(self.model)
        gathered: dict[int, Tensor] = {}  # by id: tied weights once
        state: dict[str, Tensor] = {}

        def kept(whole: Tensor) -> Tensor:
            return whole.cpu() if keeps else torch.empty(0)

        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if is_adapter(name):
                continue
            if id(tensor) not in gathered:
                # No variable may hold the whole tensor, or it still exists while the next one is
                # gathered.
                gathered[id(tensor)] = kept(self._whole(name, tensor, layers))
            state[plain_name(name)] = gathered[id(tensor)]
        return state

    def _whole(
        self,
        name: str,
        tensor: Tensor,
        layers: dict[str, Any],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Gather a tensor and add its adapter's update, if adapters are merged."""
        layer = layers.get(name) if self.merged else None
        if layer is None:
            return full_tensor(narrowed(tensor.detach(), dtype))  # gathers half the bytes
        whole = full_tensor(tensor.detach())
        parts = (full_tensor(p[ADAPTER].weight.detach()) for p in (layer.lora_A, layer.lora_B))
        return narrowed(add_update(layer, whole, *parts), dtype)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the configuration and every tensor; takes about a second per GB."""
        config = {k: v for k, v in self.model.config.to_dict().items() if k != "_name_or_path"}
        digest = hashlib.sha256(f"{type(self.model).__name__} {config}".encode())
        for name, tensor in self.named_tensors():
            raw = tensor.reshape(-1).cpu().contiguous().view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(raw.numpy().data)
        return digest.hexdigest()

    def base_digest(self) -> str:
        """Return a SHA-256 of some values of every tensor, without adapters.

        Values are rounded to bfloat16, so that the digest does not depend on the dtype in which the
        model was loaded. It costs as much as a weight sync: sharded tensors are gathered.
        """
        digest = hashlib.sha256()
        for name, tensor in replace(self, merged=False).named_tensors():
            flat = tensor.reshape(-1)
            some = flat[:: max(1, len(flat) // 4096)].bfloat16().view(torch.int16)
            digest.update(f"{name} {tuple(tensor.shape)} {some.tolist()}".encode())
        return digest.hexdigest()


def narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a large tensor cast to a narrower dtype, or a small or narrow one unchanged.

    Norms, biases and routers of experts stay as they are: they are small, and engines may keep them
    in 32 bits.

    Args:
        tensor: a weight of any dtype.
        dtype: the engine's dtype; None changes nothing.
    """
    if dtype is None or not (tensor.is_floating_point() and tensor.dim() > 1):
        return tensor
    if tensor.numel() < LARGE or dtype.itemsize >= tensor.dtype.itemsize:
        return tensor
    return tensor.to(dtype)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on the ranks' device; return any other tensor unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    on_device = tensor.to(tensor.device_mesh.device_type)  # from the CPU, if offloaded
    assert isinstance(on_device, DTensor)
    return on_device.full_tensor()


def plain_name(name: str) -> str:
    """Return a parameter's name without the parts that wrappers add.

    Wrappers are DDP, ``torch.compile``, activation checkpointing and adapters.

    >>> plain_name("module.model._orig_mod.layers.0._checkpoint_wrapped_module.mlp.weight")
    'model.layers.0.mlp.weight'
    """
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module.", "base_layer."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
