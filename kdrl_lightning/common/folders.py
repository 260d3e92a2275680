"""Replaces a folder by a complete one, in one step if the system can."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def replace_folder(new: Path, path: Path) -> None:
    """Move the folder ``new`` to ``path``, and delete the one that was there.

    Linux exchanges the two in one step. If the system cannot (NFS, macOS), a kill between two
    renames leaves the earlier folder as ``*.old``; an exception there moves it back.

    Args:
        new: a complete folder on the same disk; its name is free afterwards.
        path: its new name.
    """
    if not path.exists():
        os.replace(new, path)
        return
    old = new
    if not exchange(new, path):
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        try:
            os.replace(path, old)
            os.replace(new, path)
        except BaseException:  # Ctrl-C, too
            if not path.exists():
                os.replace(old, path)
            raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return whether the system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE)
    return done == 0
