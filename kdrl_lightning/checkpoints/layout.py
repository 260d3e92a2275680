"""The names of a checkpoint's files, whole and unfinished."""

from __future__ import annotations

import shutil
from pathlib import Path

SHARDS, META = ".metadata", "meta.pt"


def unfinished(path: Path) -> Path:
    """Name of a checkpoint while it is written."""
    return path.with_name(path.name + ".unfinished")


def remove_unfinished(folder: Path) -> None:
    """Delete what killed runs left half-written in a folder."""
    for path in folder.glob("*.unfinished"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
