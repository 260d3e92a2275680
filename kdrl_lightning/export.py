"""A checkpoint's student as a Hugging Face folder, without a trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from kdrl_lightning.checkpoints import read_metadata
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models import build_causal_lm, load_tokenizer
from kdrl_lightning.resume import KEY

PREFIX = "student.model."


def export(
    ckpt_path: str, output: str, tokenizer: str | None = None, dtype: str | None = None
) -> None:
    """Write the student of a checkpoint, with its tokenizer, as a Hugging Face folder.

    Args:
        ckpt_path: a checkpoint of ``fit``: a file, or a folder of shards.
        output: the folder; it must not hold a model yet.
        tokenizer: folder or hub name; the student that the run started from if None.
        dtype: torch dtype of the weights, e.g. ``bfloat16``; as trained if None.

    Raises:
        ConfigurationError: the checkpoint is broken or not of this library, a model is already
            there, or there is no tokenizer.
    """
    wanted = getattr(torch, dtype, None) if dtype else None
    if dtype and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ConfigurationError(
            f"`dtype` must be a floating-point one of torch, e.g. bfloat16: got {dtype}."
        )
    folder = Path(output)
    if (folder / "config.json").exists():
        raise ConfigurationError(
            f"`output` must be a folder without a model: got {output}. Name another."
        )
    saved = read_metadata(ckpt_path)
    if KEY not in saved:
        raise ConfigurationError(
            f"`ckpt_path` must be a checkpoint of a KDRLModule: got {ckpt_path}."
        )
    identity = saved[KEY]
    words = load_tokenizer(tokenizer or identity["student"])  # before the weights are read
    weights = student_weights(Path(ckpt_path), saved)
    if isinstance(wanted, torch.dtype):
        weights = {name: tensor.to(wanted) for name, tensor in weights.items()}
    model = build_causal_lm(identity["config"], identity["generation_config"], weights)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    size = sum(tensor.nbytes for tensor in weights.values())
    print(f"step {saved['global_step']}: {size / 1e6:.1f} MB of weights written to {folder}")


def student_weights(path: Path, saved: dict[str, Any]) -> dict[str, Tensor]:
    """Return the student's tensors by their Hugging Face names."""
    state = read_shards(path) if path.is_dir() else saved["state_dict"]
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(PREFIX)
    }


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Read the weights, and not the optimizer's moments, of a folder of shards."""
    index = FileSystemReader(folder).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.items()
        if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder, no_dist=True)  # type: ignore[attr-defined]
    return {name.removeprefix("state_dict."): tensor for name, tensor in state.items()}
