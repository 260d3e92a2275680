"""Writes a checkpoint's student as a Hugging Face folder, without a trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from kdrl_lightning.checkpoints.integrity import whole_folder
from kdrl_lightning.checkpoints.reader import read_metadata
from kdrl_lightning.checkpoints.resume import KEY, check_complete
from kdrl_lightning.common.untyped import State, Tree
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import (
    build_causal_lm,
    load_causal_lm,
    load_tokenizer,
    save_causal_lm,
)
from kdrl_lightning.models.lora import LoRA, adapter_weights, save_adapters
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.trainer.failures import reason_of

# `Any`: arguments of a model's adapters, as JSON holds them.

PREFIX = "student.model."


def export(
    ckpt_path: str,
    output: str,
    tokenizer: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    adapter: bool = False,
) -> None:
    """Write the student of a checkpoint, with its tokenizer, as a Hugging Face folder.

    Args:
        ckpt_path: a checkpoint of ``fit``: a file, or a folder of shards.
        output: path of the folder, which must not hold a model yet.
        tokenizer: folder or hub name; None: that of the student that the run started from.
        dtype: torch dtype of the weights, e.g. ``bfloat16``; None: as in training.
        base: folder or hub name of a LoRA student's base model; None: the student that the run
            started from.
        adapter: write only a LoRA student's adapters, in peft's format, instead of merging them.

    Raises:
        ConfigurationError: the checkpoint is damaged or not of this library, the folder holds a
            model or cannot be written, there is no tokenizer, an argument is wrong, or the base
            model is not the one of the adapters.
    """
    wanted = getattr(torch, dtype, None) if dtype else None
    if dtype and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ConfigurationError(
            f"`dtype` must be a floating-point type of torch: got {dtype}. Give for example "
            "bfloat16."
        )
    folder = Path(output)
    if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ConfigurationError(
            f"`output` must be a folder without a model: got {output}. Name another."
        )
    saved = read_metadata(ckpt_path)
    if KEY not in saved:
        raise ConfigurationError(
            f"`ckpt_path` must be a checkpoint of a KDRLModule: got {ckpt_path}. "
            "Give one that `fit` wrote."
        )
    identity = saved[KEY]
    if identity.get("lora") is None and (adapter or base is not None):
        raise ConfigurationError(
            f"`{'adapter' if adapter else 'base'}` must go with a LoRA student: got {ckpt_path}, "
            "which holds all weights. Leave it out."
        )
    words = load_tokenizer(tokenizer or base or identity["student"])  # before weights are read
    weights = student_weights(Path(ckpt_path), saved)
    if identity.get("lora") is not None:
        path = base or identity["student"]
        student = with_adapters(path, identity["lora"], weights, ckpt_path)
        weights = adapter_weights(student) if adapter else ModelWeights(student, path).state()
    if isinstance(wanted, torch.dtype):
        weights = {name: tensor.to(wanted) for name, tensor in weights.items()}
    try:
        with whole_folder(folder) as half:
            if adapter:
                save_adapters(student, weights, half, path)
            else:
                model = build_causal_lm(identity["config"], identity["generation_config"], weights)
                save_causal_lm(model, half)
            words.save_pretrained(half)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"`output` must be a folder that can be written: got {output} ({reason_of(error)}). "
            "Make room, or name another."
        ) from error
    size = sum(tensor.nbytes for tensor in weights.values())
    print(f"step {saved['global_step']}: {size / 1e6:.1f} MB of weights written to {folder}")


def with_adapters(
    path: str, lora: Tree, adapters: dict[str, Tensor], ckpt_path: str
) -> Any:  # transformers has no type that all models share
    """Return a base model with a checkpoint's adapters.

    Raises:
        ConfigurationError: the adapters were trained on another model, or do not fit.
    """
    kind = dict(lora)
    digest = kind.pop("base")
    model = load_causal_lm(path, next(iter(adapters.values())).dtype)
    if ModelWeights(model, path).base_digest() != digest:
        raise ConfigurationError(
            f"`base` must be the model that the adapters in {ckpt_path} were trained on: got "
            f"{path}, with different weights. Name the folder that holds it."
        )
    LoRA(**kind).inject(model, seed=0)
    check_complete(adapters.keys(), adapter_weights(model).keys(), ckpt_path)
    model.load_state_dict(adapters, strict=False)
    return model


def student_weights(path: Path, saved: State) -> dict[str, Tensor]:
    """Return the student's tensors of a checkpoint, by their Hugging Face names."""
    state = read_shards(path) if path.is_dir() else saved["state_dict"]
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(PREFIX)
    }


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a sharded checkpoint, without reading the optimizer's state."""
    index = FileSystemReader(folder).read_metadata().state_dict_metadata
    state: State = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.items()
        if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder, no_dist=True)  # type: ignore[attr-defined]
    return {name.removeprefix("state_dict."): tensor for name, tensor in state.items()}
