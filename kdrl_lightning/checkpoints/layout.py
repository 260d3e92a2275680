"""The names of a checkpoint's files, whole and unfinished."""

from __future__ import annotations

import shutil
from pathlib import Path

SHARDS, META = ".metadata", "meta.pt"


def unfinished(path: Path) -> Path:
    """Return the path of a checkpoint while it is being written."""
    return path.with_name(path.name + ".unfinished")


def remove_unfinished(folder: Path) -> None:
    """Delete the unfinished checkpoints of killed runs in a folder.

    A checkpoint that a killed run had renamed to ``*.old`` (see ``replace_folder``) gets its name
    back, unless a new checkpoint has it.
    """
    for path in folder.glob("*.unfinished"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.glob("*.ckpt.old"):
        replaced = path.with_suffix("")
        shutil.rmtree(path) if replaced.exists() else path.rename(replaced)
