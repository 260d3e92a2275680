"""Removes the folders of a run that is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer

from kdrl_lightning.errors import ConfigurationError, path_error


@contextmanager
def removed_if_refused(trainer: Trainer) -> Iterator[None]:
    """Delete the folders that loggers made for a run, if it is refused before its first step.

    Lightning opens every logger before it checks anything. Folders that existed before stay, and so
    do folders with a checkpoint.
    """
    folders = [Path(f) for f in (getattr(x, "log_dir", None) for x in trainer.loggers) if f]
    made = [p for folder in folders for p in (folder, *folder.parents) if not p.exists()]
    try:
        yield
    except Exception as error:
        refused = isinstance(error, ConfigurationError) or path_error(error) is not None
        if refused and trainer.is_global_zero and not trainer.global_step:
            for folder in folders:
                if folder in made and not any(folder.rglob("*.ckpt")):
                    shutil.rmtree(folder, ignore_errors=True)
            for parent in made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        raise
