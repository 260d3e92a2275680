"""A run that is refused leaves no folder behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdrl_lightning.errors import ConfigurationError, path_error


@contextmanager
def removed_if_refused(trainer: Any) -> Iterator[None]:
    """Delete the folders that loggers make for a run, if the run is refused before its first step.

    Lightning opens every logger before anything is checked. A folder that was there before stays,
    and so does one that holds a checkpoint.
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
