"""Removes the folders of a run that stops with a configuration error before its first step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from kdrl_lightning.errors import ConfigurationError, path_error
from kdrl_lightning.trainer.run_folder import CONFIG, MARK, reserved_folder


@contextmanager
def removed_if_refused(trainer: Trainer) -> Iterator[None]:
    """Delete the new folders of a run that is refused before its first step.

    Lightning opens every logger before it checks anything. We keep folders and files that existed
    before, and folders with a checkpoint.
    """
    root = Path(trainer.default_root_dir)
    folders = [Path(f) for f in (getattr(x, "log_dir", None) for x in trainer.loggers) if f]
    made = [p for folder in (*folders, root) for p in (folder, *folder.parents) if not p.exists()]
    had = set(root.iterdir()) if root.is_dir() else set()
    try:
        yield
    except Exception as error:
        refused = isinstance(error, ConfigurationError | MisconfigurationException)
        refused = refused or path_error(error) is not None
        if refused and trainer.is_global_zero and not trainer.global_step:
            for folder in folders:
                if folder in made and not any(folder.rglob("*.ckpt")):
                    shutil.rmtree(folder, ignore_errors=True)
            _remove_run(reserved_folder(trainer), root, had)
            for parent in made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        raise


def _remove_run(folder: Path | None, root: Path, had: set[Path]) -> None:
    """Delete what a run has written so far to the folder that it reserved without a logger."""
    if folder == root:
        for file in (root / MARK, root / CONFIG):
            if file not in had:
                file.unlink(missing_ok=True)
        return
    if folder is None or folder.parent != root or folder in had:
        return
    if not any(folder.rglob("*.ckpt")):
        shutil.rmtree(folder, ignore_errors=True)
