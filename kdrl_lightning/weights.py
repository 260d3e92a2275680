"""Read access to a model's weights, for the engines that sample from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class ModelWeights:
    """What an engine may know of a model.

    Attributes:
        model: the live transformers model; an engine in this process may sample from it directly.
        path: the folder or hub name that it was loaded from.
        end_token_id: where a teacher ends with another token than the student: the token.
        vocab_size: where a teacher has more rows than the student: the student's.
    """

    model: Any
    path: str
    end_token_id: int | None = None
    vocab_size: int | None = None

    @property
    def sharded(self) -> bool:
        """Whether ranks hold parts; reading is then a collective, on all ranks alike."""
        return any(isinstance(p, DTensor) for p in self.model.parameters())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights by their Hugging Face names, one at a time, tied ones under each.

        Sharded ones are gathered, whole on every rank for as long as the caller keeps them. Every
        rank must then take all of them, also one that has no use for them.
        """
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            yield plain_name(name), full_tensor(tensor.detach())

    def save(self, path: str, writes: bool = True) -> None:
        """Write a Hugging Face folder; all ranks must call it if the model is sharded.

        Args:
            path: of the folder.
            writes: on the one rank that does; it alone holds all weights, on the CPU.
        """
        if not self.sharded:
            if writes:
                self.model.save_pretrained(path)
            return
        gathered: dict[int, Tensor] = {}  # by id: tied weights once
        state: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in gathered:
                whole = full_tensor(tensor.detach())
                gathered[id(tensor)] = whole.cpu() if writes else torch.empty(0)
            state[plain_name(name)] = gathered[id(tensor)]
        if writes:
            self.model.save_pretrained(path, state_dict=state)

    def fingerprint(self) -> str:
        """Digest the configuration and every tensor, about a second per gigabyte."""
        config = {k: v for k, v in self.model.config.to_dict().items() if k != "_name_or_path"}
        digest = hashlib.sha256(f"{type(self.model).__name__} {config}".encode())
        for name, tensor in self.named_tensors():
            raw = tensor.reshape(-1).cpu().contiguous().view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(raw.numpy().data)
        return digest.hexdigest()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, on the ranks' device; any other as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    on_device = tensor.to(tensor.device_mesh.device_type)  # from the CPU, if offloaded
    assert isinstance(on_device, DTensor)
    return on_device.full_tensor()


def plain_name(name: str) -> str:
    """Strip what wrappers (DDP, ``torch.compile``, activation checkpointing) put into a name.

    >>> plain_name("module.model._orig_mod.layers.0._checkpoint_wrapped_module.mlp.weight")
    'model.layers.0.mlp.weight'
    """
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
