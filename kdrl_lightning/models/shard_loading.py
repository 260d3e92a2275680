"""Loading weights and optimizer moments directly into shards: no rank ever holds all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType
from torch.distributed.tensor import DTensor, Shard

from kdrl_lightning.common.untyped import HFModel, State

# `Any`: safetensors has no types, and torch types the states of optimizers as `Any`.


class WeightFiles:
    """Reads the safetensors files of a Hugging Face folder slice by slice.

    Args:
        folder: a folder with ``model.safetensors``, or with several files and their index.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        files = [folder / "model.safetensors"]
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        self._files: list[Any] = [safe_open(file, "pt") for file in files if file.is_file()]
        self._home: dict[str, Any] = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> set[str]:
        """Names of all tensors in the files."""
        return set(self._home)

    def name_of(self, names: list[str], shape: torch.Size) -> str | None:
        """Return the first of a tensor's names that is in the files.

        None if there is none, or if that tensor has another shape.
        """
        for name in names:
            if name in self._home:
                same = list(self._home[name].get_slice(name).get_shape()) == list(shape)
                return name if same else None
        return None

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Read rows ``start`` to ``end - 1`` of a tensor, and nothing else of it."""
        part: Tensor = self._home[name].get_slice(name)[start:end]
        return part

    def scalar(self, name: str) -> Tensor:
        """Read a tensor without dimensions."""
        value: Tensor = self._home[name].get_tensor(name)
        return value


def sources(model: nn.Module, files: WeightFiles) -> dict[int, str] | None:
    """Map the ``id`` of each parameter and stored buffer to its name in the files.

    Return None if the files lack one of them: only transformers can convert such a checkpoint
    (renamed, fused or quantised weights).
    """
    names: dict[int, list[str]] = {}
    shapes: dict[int, torch.Size] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)  # files hold tied weights under one name
        shapes[id(tensor)] = tensor.shape
    found = {key: files.name_of(several, shapes[key]) for key, several in names.items()}
    known = {key: name for key, name in found.items() if name is not None}
    return known if len(known) == len(found) else None


def to_meta(model: nn.Module) -> None:
    """Drop the storage of all parameters; tied ones stay tied, and buffers keep their values."""
    seen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in seen:
                    seen[id(parameter)] = nn.Parameter(
                        parameter.detach().to("meta"), parameter.requires_grad
                    )
                module._parameters[name] = seen[id(parameter)]


@torch.no_grad()
def fill(
    module: nn.Module,
    model: HFModel,
    names: dict[str, str],
    files: WeightFiles,
    given: dict[str, Tensor],
    on: str,
) -> None:
    """Give a sharded model on the meta device its storage and read this rank's rows into it.

    Args:
        module: the FSDP root.
        model: the transformers model inside ``module``.
        names: name in the files of each parameter and stored buffer, by its name in ``model``.
        files: the files to read.
        given: whole tensors that no file holds, by name in ``model``.
        on: device of this rank's shards.
    """
    buffers = {name: buffer for name, buffer in module.named_buffers()}
    module.to_empty(device=on)
    for name, buffer in buffers.items():  # to_empty drops their values
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = buffer
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in names and name not in given:
            continue
        local, start = tensor, 0
        if isinstance(tensor, DTensor):
            assert tensor.placements == (Shard(0),)
            local = tensor.to_local()
            start = tensor.device_mesh.get_local_rank() * -(
                -tensor.shape[0] // tensor.device_mesh.size()
            )
        if not local.ndim:
            local.copy_(files.scalar(names[name]) if name in names else given[name])
        elif local.numel():
            end = start + local.shape[0]
            known = given.get(name)
            local.copy_(files.rows(names[name], start, end) if known is None else known[start:end])


def load_moments(module: nn.Module, optimizer: Any, source: Path | State, key: str) -> None:
    """Load the state of a sharded module's optimizer; all ranks must call it.

    Lightning's own loading requires moments for all parameters. A parameter that never had a
    gradient (a vision tower on text, an expert without tokens) has none, and here it stays without.

    Args:
        module: the sharded module with all parameters.
        optimizer: an optimizer over some of them.
        source: a folder of shards, or the whole state on the first rank.
        key: the optimizer's key among the shards.
    """
    state: Any = get_optimizer_state_dict(module, optimizer)  # creates moments for all parameters
    options = StateDictOptions(strict=False, cpu_offload=isinstance(source, Path))
    if isinstance(source, Path):
        index = FileSystemReader(source).read_metadata().state_dict_metadata
        held = {n for n in state["state"] if any(k.startswith(f"{key}.state.{n}.") for k in index)}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
        part = {"state": {n: state["state"][n] for n in held}, "param_groups": groups}
        dcp.load({key: part}, checkpoint_id=source)  # type: ignore[attr-defined]
        for group, loaded in zip(state["param_groups"], part["param_groups"], strict=True):
            group.update(loaded)
        state["state"].update(part["state"])
    else:
        if source["state"] and isinstance(next(iter(source["state"])), int):
            by_name = OptimStateKeyType.PARAM_NAME
            source = FullyShardedDataParallel.rekey_optim_state_dict(source, by_name, module)
        held = set(source["state"])
        state, options = source, replace(options, broadcast_from_rank0=True, full_state_dict=True)
    set_optimizer_state_dict(module, optimizer, state, options=options)
    for name, parameter in module.named_parameters():
        if name not in held:
            optimizer.state.pop(parameter, None)
