"""Loading a model and its moments straight into shards, so that no rank ever holds all of it."""

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


class WeightFiles:
    """The safetensors files of a Hugging Face folder, read slice by slice.

    Args:
        folder: with ``model.safetensors``, or several files and their index.
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
        """Return the names of all tensors."""
        return set(self._home)

    def name_of(self, names: list[str], shape: torch.Size) -> str | None:
        """Return under which of a tensor's names it is here, in this shape."""
        for name in names:
            if name in self._home:
                same = list(self._home[name].get_slice(name).get_shape()) == list(shape)
                return name if same else None
        return None

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Read some rows of a tensor, and nothing else of it."""
        part: Tensor = self._home[name].get_slice(name)[start:end]
        return part

    def scalar(self, name: str) -> Tensor:
        """Read a tensor without rows."""
        value: Tensor = self._home[name].get_tensor(name)
        return value


def sources(model: nn.Module, files: WeightFiles) -> dict[int, str] | None:
    """Map the id of each parameter and stored buffer to its name in the files; None if one lacks.

    Checkpoints that transformers has to convert (renamed, fused or quantised weights) lack some.
    """
    names: dict[int, list[str]] = {}
    shapes: dict[int, torch.Size] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)  # tied weights lie under one of theirs
        shapes[id(tensor)] = tensor.shape
    found = {key: files.name_of(own, shapes[key]) for key, own in names.items()}
    known = {key: name for key, name in found.items() if name is not None}
    return known if len(known) == len(found) else None


def to_meta(model: nn.Module) -> None:
    """Drop the storage of all parameters, tied ones staying tied; buffers keep their values."""
    seen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None:
                if id(own) not in seen:
                    seen[id(own)] = nn.Parameter(own.detach().to("meta"), own.requires_grad)
                module._parameters[name] = seen[id(own)]


@torch.no_grad()
def fill(
    module: nn.Module,
    model: Any,
    names: dict[str, str],
    files: WeightFiles,
    given: dict[str, Tensor],
    on: str,
) -> None:
    """Give a sharded model on the meta device its storage, and read this rank's rows into it.

    Args:
        module: the root of the sharding.
        model: the transformers model inside.
        names: of each parameter and stored buffer, its name in the files.
        files: to read from.
        given: whole tensors that are in no file.
        on: device of the parts.
    """
    buffers = {name: buffer for name, buffer in module.named_buffers()}
    module.to_empty(device=on)
    for name, buffer in buffers.items():  # to_empty forgets them
        owner, _, own = name.rpartition(".")
        module.get_submodule(owner)._buffers[own] = buffer
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


def load_moments(
    module: nn.Module, optimizer: Any, source: Path | dict[str, Any], key: str
) -> None:
    """Load the state of a sharded module's optimizer; all ranks must call it.

    Lightning demands the moments of all parameters, but one that never had a gradient (a vision
    tower on text, an expert without tokens) has none. It has none after a resume, too.

    Args:
        module: with all parameters.
        optimizer: over some of them.
        source: a folder of shards; or the whole state, on the first rank.
        key: of the optimizer among the shards.
    """
    state: Any = get_optimizer_state_dict(module, optimizer)  # makes moments for all
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
