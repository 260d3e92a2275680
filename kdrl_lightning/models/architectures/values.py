"""Checks of the values of weights, and of their types in the files that they come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.errors import ConfigurationError

INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}  # of safetensors
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
    if getattr(model, "hf_quantizer", None) is None:
        _refuse(first_with(model, is_whole), path)


def check_stored(model: HFModel, folder: Path, unread: Collection[str], path: str) -> None:
    """Refuse a model some of whose weights are of an integer type in their file.

    Buffers may be, e.g. masks and positions.

    Args:
        model: the loaded model.
        folder: folder of its files.
        unread: names in the files that it did not use.
        path: folder or hub name of the model, for messages.

    Raises:
        ConfigurationError: the file holds integers for a weight.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    start = f"{model.base_model_prefix}."
    for name in sorted(set(integers_in(folder)) - set(unread)):
        # Files of fused experts have other names than the model.
        renamed = name.endswith(".weight")
        if renamed or {name, start + name, name.removeprefix(start)} & known:
            _refuse(name, path)


def integers_in(folder: Path) -> Iterator[str]:
    """Yield the names of a folder's tensors of an integer type."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if opened.get_slice(name).get_dtype() in INTEGERS:
                    yield name
    for file in folder.glob("pytorch_model*.bin"):
        held = torch.load(file, map_location="meta", weights_only=True)
        yield from (name for name, tensor in held.items() if not tensor.is_floating_point())


def _refuse(name: str | None, path: str) -> None:
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
