"""The most memory that this process has held."""

from __future__ import annotations

import resource
import sys

import torch

GB = 1e9


def peak_gb(device: torch.device) -> float:
    """Return GB: of the GPU, what torch had allocated at most; on a CPU the largest resident set.

    >>> 0.0 < peak_gb(torch.device("cpu")) < 1e6
    True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB
