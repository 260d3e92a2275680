"""Checks that a run's devices exist, have enough memory, and compute the right scores."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor

from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.models.architectures.fast_path import check_fast_path
from kdrl_lightning.models.architectures.trunk import Trunk
from kdrl_lightning.models.loading import skeleton_causal_lm
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.teachers.frozen import FrozenModels


def check_devices(accelerator: object, devices: object) -> None:
    """Check that the GPUs that a trainer's flags name exist, before the trainer is made.

    Lightning's messages do not say why there is no GPU, or what to do.

    Args:
        accelerator: value of the flag ``accelerator``.
        devices: value of the flag ``devices``: a number, or indices.

    Raises:
        ConfigurationError: torch finds no GPU, or none with such an index.
    """
    if accelerator not in ("gpu", "cuda", "auto"):
        return
    if not torch.cuda.is_available():
        if accelerator == "auto" or (accelerator == "gpu" and torch.backends.mps.is_available()):
            return
        why = "torch finds no NVIDIA driver that it can use"
        if torch.version.cuda is None and torch.version.hip is None:
            why = f"torch {torch.__version__} is built without CUDA"
        raise ConfigurationError(
            f"`accelerator` must be one that this machine has: got {accelerator}, but {why}. Check "
            "`nvidia-smi` and the build of torch, or set `accelerator: cpu`."
        )
    found = torch.cuda.device_count()
    highest = max(_indices(devices), default=-1)
    if highest >= found:
        raise ConfigurationError(
            f"`devices` must name GPUs of this machine, which has {found} (0 to {found - 1}): got "
            f"{devices}. Correct it; CUDA_VISIBLE_DEVICES may hide some."
        )


def check_memory(path: str, device: torch.device, ranks: int, adapters: bool) -> None:
    """Refuse a GPU that cannot even hold a student's weights and their gradients.

    Moments, teacher and activations need more memory; ``plan`` counts them.

    Args:
        path: folder or hub name of the student.
        device: the device that trains it.
        ranks: devices that share the weights; 1 unless they are sharded.
        adapters: whether only adapters are trained; their size is not counted.

    Raises:
        ConfigurationError: the GPU is too small.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return
    total = torch.cuda.mem_get_info(device)[1]
    numbers = sum(p.numel() for p in skeleton_causal_lm(path).parameters())
    least = numbers * torch.get_default_dtype().itemsize * (1 if adapters else 2) / ranks
    if least <= total:
        return
    held = "weights" if adapters else "weights and gradients"
    cure = "Set `strategy: fsdp2`" + ("" if adapters else " or `model.lora`")
    if ranks > 1:
        cure = "Use more GPUs" + ("" if adapters else " or `model.lora`")
    raise ConfigurationError(
        f"a GPU must have room for the student: got {path}, whose {held} alone take "
        f"{least / 1e9:.3g} GB on each, and a GPU of {total / 1e9:.3g} GB. {cure}; "
        "`python -m kdrl_lightning plan` with the same flags says what fits."
    )


def memory_error(error: BaseException | None) -> TrainingStopped | None:
    """Return an error for the user if a full GPU has caused ``error``, else None.

    >>> str(memory_error(torch.OutOfMemoryError("CUDA out of memory.")))[:60]
    'a GPU must have room for the run: got CUDA out of memory. Ru'
    """
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return TrainingStopped(
        f"a GPU must have room for the run: got {reason}. Run `python -m kdrl_lightning plan` with "
        "the same flags: it says which phase needs most, and what to set."
    )


def _indices(devices: object) -> list[int]:
    """Return the GPUs that a flag names; empty if it names none, such as ``auto`` or -1.

    >>> _indices([3]), _indices("0,2"), _indices(2), _indices("auto"), _indices(-1)
    ([3], [0, 2], [0, 1], [], [])
    """
    if isinstance(devices, str):
        parts = [part.strip() for part in devices.split(",") if part.strip()]
        if not parts or not all(part.isdigit() for part in parts):
            return []
        devices = [int(part) for part in parts] if "," in devices else int(parts[0])
    if isinstance(devices, int):
        return list(range(devices))
    return [d for d in devices if isinstance(d, int)] if isinstance(devices, list) else []


def check_fast_paths(
    trainer: pl.Trainer,
    student: tuple[Scorer, Trunk, str],
    frozen: FrozenModels,
    reduce: Callable[[Tensor, str], Tensor],
) -> None:
    """Compare kernels and compiled layers of a run's models with plain ones, on a GPU.

    All ranks must call it.

    Args:
        trainer: the run's trainer, for device and precision.
        student: the student, how its layers run, and its name.
        frozen: teacher and reference.
        reduce: ``(tensor, "sum") -> tensor`` over ranks.

    Raises:
        ConfigurationError: a kernel fails, or gives different scores.
    """
    if trainer.strategy.root_device.type != "cuda":
        return

    def check() -> None:
        check_fast_path(*student)
        frozen.check_fast_paths()

    with trainer.precision_plugin.forward_context():
        stop_together(check, reduce)
