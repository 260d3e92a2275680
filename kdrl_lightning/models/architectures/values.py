"""Checks that weights are finite floats, in the loaded model and in its files."""

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
LOOKED_AT = 4096  # about how many values of a tensor `is_whole` looks at
FEW = 4  # a constant, a mask or ternary weights have at most this many distinct values


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

    Without a ``quantization_config``, transformers copies the file's whole numbers into the layers.

    Raises:
        ConfigurationError: on all ranks, with the name of the first such tensor.
    """
    if getattr(model, "hf_quantizer", None) is None:
        _refuse(first_with(model, is_whole), path)


def check_stored(model: HFModel, folder: Path, unread: Collection[str], path: str) -> None:
    """Refuse a model whose files store a weight as integers.

    Buffers may be integers, e.g. masks and positions.

    Args:
        model: the loaded model.
        folder: folder of its files.
        unread: names of tensors in the files that it did not use.
        path: folder or hub name of the model, for messages.

    Raises:
        ConfigurationError: the file holds integers for a weight.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    start = f"{model.base_model_prefix}."
    for name in sorted(set(integers_in(folder)) - set(unread)):
        # In files, experts that the model fuses have other names than in the model.
        renamed = name.endswith(".weight")
        if renamed or {name, start + name, name.removeprefix(start)} & known:
            _refuse(name, path)


def integers_in(folder: Path) -> Iterator[str]:
    """Yield the names of the tensors that a folder's files store as integers."""
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
    """Return the name of the first parameter for which ``found`` is true on any rank, else None.

    Args:
        model: the model; if it is sharded, all ranks must make this call.
        found: the condition; it gets this rank's shard, unless that is empty.
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
    """Return whether values are integers, or floats that look like quantized whole numbers.

    Such floats are whole numbers with more than ``FEW`` distinct values. We look at a sample.

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
    low, high = values.aminmax()  # unlike isfinite, it allocates no tensor of this size
    return not bool(low.isfinite() and high.isfinite())
