"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch

GB = 1e9


def peak_gb(device: torch.device) -> float:
    """Return the peak memory in GB: torch's allocations on a GPU, the resident set size on a CPU.

    >>> 0.0 < peak_gb(torch.device("cpu")) < 1e6
    True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB
