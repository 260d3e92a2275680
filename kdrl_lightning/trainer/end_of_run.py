"""Checks at the start what could fail at the end of a run, and writes the trained student."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError

from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.common.folders import replace_folder
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.lora import is_adapter
from kdrl_lightning.trainer.failures import not_exported
from kdrl_lightning.trainer.protocols import TrainedModule, student_of


def write_or_warn(file: Path, write: Callable[[], object]) -> None:
    """Write a file that the run does not need; if that fails, warn and continue."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"{file} could not be written: {reason}", stacklevel=2)


def check_space(needs: Mapping[Path, int]) -> None:
    """Check that a run can write to its folders, and that their disks have room for it.

    Args:
        needs: bytes per folder, which need not exist yet.

    Raises:
        ConfigurationError: a folder cannot be made or written, or a disk is too full.
    """
    disks: dict[int, int] = {}
    for folder, size in needs.items():
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            why = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
            found = (
                f"may not be written ({os.strerror(why)})" if place.is_dir() else "is not a folder"
            )
            raise ConfigurationError(
                f"`{folder}` must be a folder that the run can write: got {place}, which {found}. "
                "Name another with `trainer.default_root_dir` or `checkpoint.dirpath`."
            )
        disk = place.stat().st_dev
        disks[disk] = disks.get(disk, 0) + size
        free = shutil.disk_usage(place).free
        if disks[disk] > free:
            raise ConfigurationError(
                f"the disk of {folder} must have {disks[disk] / 1e9:.3g} GB free for the trained "
                f"student and a checkpoint: got {free / 1e9:.3g} GB. Make room, or write elsewhere "
                "with `trainer.default_root_dir`."
            )


def student_bytes(pl_module: TrainedModule) -> int:
    """Return the bytes of the student's weights as a model folder, with adapters merged."""
    named = pl_module.weights().model.named_parameters()
    sizes: list[int] = [p.numel() * p.element_size() for n, p in named if not is_adapter(n)]
    return sum(sizes)


def checkpoint_bytes(pl_module: TrainedModule) -> int:
    """Return the size of a checkpoint: its weights, and the optimizer's state.

    A LoRA student's checkpoint holds only the adapters.
    """
    trained = [
        p for p in student_of(pl_module).parameters() if p.requires_grad or not pl_module.lora
    ]
    weights: int = sum(p.numel() * p.element_size() for p in trained)
    return int(weights * (1 + _moments(pl_module)))


def _moments(pl_module: TrainedModule) -> float:
    """Return how many numbers the optimizer keeps per weight, measured in one trial step."""
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer = pl_module.optimizer_callable([weight])
        optimizer.step()
        state = optimizer.state[weight].values()
    except Exception:  # it needs more than gradients: count only the weights
        return 0.0
    return sum(v.numel() for v in state if isinstance(v, torch.Tensor)) / weight.numel()


def save_student(
    trainer: pl.Trainer, pl_module: TrainedModule, folder: Path, alone: bool = False
) -> None:
    """Write the student as a Hugging Face folder, completely or not at all.

    Args:
        trainer: the run's trainer.
        pl_module: the module with the student.
        folder: folder of the model; an earlier model there is replaced.
        alone: write on the first rank without waiting for the others, which may have failed.

    Raises:
        TrainingStopped: on all ranks, if it cannot be written.
    """
    first, half = trainer.is_global_zero, folder.with_name(f"{folder.name}.unfinished")

    def write() -> None:
        try:
            if first:
                shutil.rmtree(half, ignore_errors=True)
            pl_module.weights().save(str(half), first)
            if first:
                write_or_warn(
                    half / "tokenizer", lambda: pl_module.tokenizer.save_pretrained(str(half))
                )
                replace_folder(half, folder)
        except BaseException as error:
            shutil.rmtree(half, ignore_errors=True)  # a partial export would keep the disk full
            if isinstance(error, OSError | SafetensorError):
                raise not_exported(trainer, str(folder), error) from error
            raise

    if alone:
        write()
    else:
        stop_together(write, pl_module.reduce)
