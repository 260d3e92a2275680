"""Counts the bytes that torch's CPU allocator holds, in all threads; needs gcc and glibc.

torch's profiler sees only the threads that it watches, and only from its start on: it never
subtracts a tensor that another thread frees, and misses tensors allocated earlier. The library of
``counted_memory.c`` counts both.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_suffix(".c")
SMALLEST = 4096  # bytes that the library counts
# oneDNN, which multiplies in bfloat16 on a CPU, keeps two descriptors of 258 kB per shape, each in
# a cache of its own, however small the product is. A GPU has neither.
NO_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}


def preloaded(folder: Path) -> dict[str, str]:
    """Build the library into a folder; return the variables of a process that counts.

    They leave out what oneDNN keeps of each shape of a product in bfloat16.
    """
    library = folder / "counted_memory.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library), **NO_CACHES}


class Peaks:
    """Records the peak of allocated bytes in each phase; only the innermost phase counts.

    Attributes:
        most: peak in bytes, by phase.
    """

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self._phases: list[str] = []
        self._library = ctypes.CDLL(None)
        for name in ("counted_now", "counted_most"):
            getattr(self._library, name).restype = ctypes.c_size_t
        self._library.counted_at.argtypes = [ctypes.c_void_p]

    @property
    def now(self) -> int:
        """Bytes that are allocated now."""
        return int(self._library.counted_now())

    def elsewhere(self) -> int:
        """Return the bytes of live tensors outside the allocator: mostly memory-mapped files."""
        sizes = {}
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor) and not hasattr(found, "to_local"):
                storage = found.untyped_storage()
                if storage.nbytes() and not self._library.counted_at(storage.data_ptr()):
                    sizes[storage.data_ptr()] = storage.nbytes()
        return sum(size for size in sizes.values() if size >= SMALLEST)

    # `Any`: a method of any object.
    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Count calls of a method as a phase."""
        setattr(owner, name, self.watched(getattr(owner, name), phase))

    def watched(self, inner: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Return a function whose calls count as a phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._pause()
            self._phases.append(phase)
            try:
                return inner(*args, **kwargs)
            finally:
                self._pause()
                self._phases.pop()

        return call

    def _pause(self) -> None:
        """Write down the peak of the innermost phase since the last pause."""
        if self._phases:
            phase = self._phases[-1]
            self.most[phase] = max(self.most.get(phase, 0), int(self._library.counted_most()))
        self._library.counted_restart()
