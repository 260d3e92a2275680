"""Checks of the values of weights, whatever file they came from."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.untyped import HFModel

LOOKED_AT = 4096  # values of a tensor
FEW = 4  # a constant, a mask or ternary weights have no more different values


def check_finite(model: HFModel, path: str) -> None:
    """Refuse weights that are NaN or infinite; all ranks must call it for a sharded model.

    Raises:
        ConfigurationError: on all ranks, with the name of the first such tensor.
    """
    name = first_with(model, _not_finite)
    if name is not None:
        raise ConfigurationError(
            f"the weights of `{path}` must be finite: got NaN or infinity in {name}. Download or "
            "export the model again."
        )


def check_floats(model: HFModel, path: str) -> None:
    """Refuse quantized weights that transformers took for floats; all ranks must call it.

    Without a ``quantization_config`` it copies the whole numbers of such a file into the layers.

    Raises:
        ConfigurationError: on all ranks, with the name of the first such tensor.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    name = first_with(model, is_whole)
    if name is not None:
        raise ConfigurationError(
            f"the weights of `{path}` must be floats: got whole numbers in {name}, as files of "
            "quantized models hold them, and no `quantization_config` that transformers knows. Add "
            "the one of that model to config.json, or name the folder of the unquantized model."
        )


def first_with(model: HFModel, found: Callable[[Tensor], bool]) -> str | None:
    """Return the name of the first parameter for which ``found`` is true on a rank, else None.

    Args:
        model: on all ranks, if it is sharded; ``found`` gets this rank's part, if it is not empty.
        found: called until it returns True.
    """
    names, first, mesh = [], torch.inf, None
    for number, (name, tensor) in enumerate(model.named_parameters()):
        names.append(name)
        part = tensor.detach()
        if isinstance(part, DTensor):
            mesh, part = part.device_mesh, part.to_local()
        if first == torch.inf and part.numel() and not part.is_meta and found(part):
            first = float(number)
    if mesh is not None:
        value = torch.tensor(first, device=mesh.device_type)
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
        first = float(value)
    return None if first == torch.inf else names[int(first)]


def is_whole(values: Tensor) -> bool:
    """Return whether values are of an integer type, or are all whole numbers and differ.

    >>> is_whole(torch.arange(8.0)), is_whole(torch.ones(8)), is_whole(torch.arange(8.0) / 3)
    (True, False, False)
    """
    if not values.is_floating_point():
        return True
    flat = values.reshape(-1)
    some = flat[:: max(1, len(flat) // LOOKED_AT)].float()
    return bool((some == some.round()).all()) and len(some.unique()) > FEW


def _not_finite(values: Tensor) -> bool:
    if not values.is_floating_point() or values.element_size() == 1:
        return False
    low, high = values.aminmax()  # unlike isfinite, it makes no tensor of that size
    return not bool(low.isfinite() and high.isfinite())
