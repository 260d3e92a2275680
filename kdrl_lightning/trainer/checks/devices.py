"""Whether a machine has the devices that a configuration names, and computes right on them."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor

from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.architectures.fast_path import check_fast_path
from kdrl_lightning.models.architectures.trunk import Trunk
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.teachers.frozen import FrozenModels


def check_devices(accelerator: object, devices: object) -> None:
    """Check a trainer's flags for GPUs before the trainer is made.

    Lightning's messages do not say why there is no GPU, or what to do.

    Args:
        accelerator: the flag of that name.
        devices: the flag of that name: a number, or indices.

    Raises:
        ConfigurationError: torch finds no GPU, or no GPU of that index.
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
        trainer: its device and precision are the run's.
        student: the student, how its layers run, and its name.
        frozen: teacher and reference.
        reduce: ``(tensor, "sum") -> tensor`` over ranks.

    Raises:
        ConfigurationError: a kernel fails, or gives other scores.
    """
    if trainer.strategy.root_device.type != "cuda":
        return

    def check() -> None:
        check_fast_path(*student)
        frozen.check_fast_paths()

    with trainer.precision_plugin.forward_context():
        stop_together(check, reduce)
