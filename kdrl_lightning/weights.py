"""Read access to a model's weights, for the engines that sample from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelWeights:
    """What an engine may know of a model.

    Attributes:
        model: the live transformers model; an engine in this process may sample from it directly.
        path: the folder or hub name that it was loaded from.
    """

    model: Any
    path: str

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights by their Hugging Face names, one at a time, tied ones under each."""
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            yield name, tensor.detach()

    def fingerprint(self) -> str:
        """Digest the configuration and every tensor, about a second per gigabyte."""
        config = {k: v for k, v in self.model.config.to_dict().items() if k != "_name_or_path"}
        digest = hashlib.sha256(f"{type(self.model).__name__} {config}".encode())
        for name, tensor in self.named_tensors():
            raw = tensor.reshape(-1).cpu().contiguous().view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(raw.numpy().data)
        return digest.hexdigest()
