"""Chooses a folder for each run, with any logger, and writes its ``config.yaml``."""

from __future__ import annotations

import fcntl
import inspect
import os
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from pydoc import locate
from typing import cast
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.trainer.protocols import is_trial_run

# An empty file that reserves a folder for one run before the run writes anything else.
MARK = ".run"
CONFIG = "config.yaml"
# A folder with one of these is not free: it belongs to a run of an earlier version, which wrote no
# mark, or has files of a user, which a run would overwrite.
WRITTEN = ("checkpoints/step=*.ckpt", "student", "summary.json", "samples.html", CONFIG)

_folders: WeakKeyDictionary[pl.Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: pl.Trainer, file: str | None = None) -> Path:
    """Return the folder of a trainer's run, the same on all ranks; the first call reserves it.

    With a logger it is ``save_dir/name/version``, as for Lightning's checkpoints. Without a logger
    it is ``default_root_dir``. If another run has it, the run takes the next free folder beside it
    (``-1``, ``-2``, ...) or, without a logger, inside it (``version_1``, ``version_2``, ...). A
    resumed run gets a new folder, too.

    All ranks must make the first call. A trial run (``fast_dev_run``) reserves nothing.

    Args:
        trainer: the run's trainer.
        file: the only file that the run writes; None: it writes several. With one file, a folder
            is free if it lacks this file, and an empty file ``<file>.part`` reserves it.

    Raises:
        ConfigurationError: on every rank, if the first one cannot create it.
    """
    if trainer not in _folders:
        found: tuple[Path, str | None] = Path(), None
        if trainer.is_global_zero:
            try:
                found = _reserve(trainer, file), None
            except OSError as error:
                found = _place(trainer)[0], f"{type(error).__name__}: {error}"
        folder, problem = trainer.strategy.broadcast(found)
        if problem is not None:
            raise ConfigurationError(
                f"the run folder must be writable: got {folder} ({problem}). Set "
                "`trainer.default_root_dir`, or the logger's `save_dir`."
            )
        _folders[trainer] = folder
    return _folders[trainer]


def reserved_folder(trainer: pl.Trainer) -> Path | None:
    """Return the folder of a trainer's run; None if it has reserved none yet."""
    return _folders.get(trainer)


def hold(folder: Path) -> int | None:
    """Lock a run's folder, which marks the run as alive, until ``os.close`` or the process ends.

    Returns:
        The file descriptor to close; None if the folder is already locked, or if the file system
        has no locks.
    """
    try:
        held = os.open(folder / MARK, os.O_RDWR | os.O_CREAT)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def is_alive(folder: Path) -> bool:
    """Return whether a process is still running the run of a folder."""
    if not (folder / MARK).exists():
        return False
    held = hold(folder)
    if held is not None:
        os.close(held)
    return held is None


def checkpoint_folders(trainer: pl.Trainer) -> list[Path]:
    """Return the checkpoint folders of all runs under the same name; any rank may call it.

    If the logger continues a run by its version (e.g. a run id), and that run has checkpoints, only
    that run's folders are returned.
    """
    parent, name = _place(trainer)
    if name == Path():
        return [run / "checkpoints" for run in (parent, *parent.glob("version_*"))]
    if name is None:
        return list(parent.glob("*/checkpoints"))
    runs = [parent / name, *parent.glob(f"{escape(str(name))}-*")]
    named = not isinstance(trainer.loggers[0], CSVLogger | TensorBoardLogger)  # these number runs
    if named and any(True for run in runs for _ in run.glob("checkpoints/step=*.ckpt")):
        return [run / "checkpoints" for run in runs]
    return list(parent.glob("/".join(["*"] * len(name.parts)) + "/checkpoints"))


def _place(trainer: pl.Trainer) -> tuple[Path, Path | None]:
    """Return the parent folder of all runs of a name, and this run's path in it, if known yet."""
    logger = next(iter(trainer.loggers), None)
    if logger is None:
        return Path(trainer.default_root_dir), Path()
    parent = Path(logger.save_dir or trainer.default_root_dir, str(logger.name or ""))
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        parent = Path(os.path.expanduser(os.path.expandvars(parent)))
        folder = Path(logger.log_dir)
        return parent, Path(os.path.relpath(folder, parent))
    if logger.version is None:
        return parent, None
    version = logger.version
    return parent, Path(f"version_{version}" if isinstance(version, int) else version)


def _reserve(trainer: pl.Trainer, file: str | None) -> Path:
    written, mark = (WRITTEN, MARK) if file is None else ((file,), f"{file}.part")
    parent, name = _place(trainer)
    for folder in _candidates(parent, name):
        if is_trial_run(trainer):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        if any(True for pattern in written for _ in folder.glob(pattern)):
            continue
        try:
            (folder / mark).touch(exist_ok=False)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there is always one more candidate")


def _candidates(parent: Path, name: Path | None) -> Iterator[Path]:
    number = 0
    if name is not None:
        yield parent / name
        number = 1
    inside = name is None or name == Path()
    while True:
        yield parent / (f"version_{number}" if inside else f"{name}-{number}")
        number += 1


def loggers_in_root(trainer: Namespace) -> None:
    """Let loggers write to ``default_root_dir``, unless they have a ``save_dir``.

    Args:
        trainer: configuration of the trainer, before anything is built; changed in place.
    """
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        settings = getattr(logger, "init_args", None) or {}
        if "save_dir" in settings and settings["save_dir"] in (
            None,
            "",
            *_defaults(cast(type, locate(logger.class_path))),
        ):
            settings["save_dir"] = trainer.default_root_dir


def _defaults(logger: type) -> list[object]:
    """Return the default of ``save_dir`` in a class of loggers and its bases."""
    found = [inspect.signature(c).parameters.get("save_dir") for c in inspect.getmro(logger)[:-1]]
    return [parameter.default for parameter in found if parameter is not None]


class RunConfig(SaveConfigCallback):
    """Writes the command line's whole configuration as ``config.yaml`` into the run folder.

    It waits until the models are loaded, so a run that is refused earlier leaves no file.
    Subcommands other than ``fit`` write it if a logger gives them a folder.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Do nothing; Lightning would already write the file here."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        self._write(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, unless training has written it."""
        self._write_beside_log(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        self._write_beside_log(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        self._write_beside_log(trainer)

    def _write_beside_log(self, trainer: pl.Trainer) -> None:
        if trainer.loggers:
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if self.already_saved or is_trial_run(trainer):
            return
        file = run_folder(trainer) / self.config_filename
        if trainer.is_global_zero:
            self.parser.save(self.config, str(file), skip_none=False, overwrite=True)
        self.already_saved = True
