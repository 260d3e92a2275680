"""Read access to a model's weights, for the engines that sample from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
