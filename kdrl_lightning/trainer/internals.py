"""Holds everything that this package uses of Lightning beyond its public interface.

Lightning may change private attributes and methods in any release. Each use is a function here, so
that an upgrade is checked in one file: read the new release's code for the names below, run
``tests/trainer/test_internals.py``, and set ``CHECKED_WITH``.

Classes of ours that override a private method of a Lightning class are listed in ``OVERRIDDEN``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.strategies.model_parallel import _load_checkpoint
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.call import _interrupt

from kdrl_lightning.common.untyped import State

# The release whose code was read for every use below.
CHECKED_WITH = "2.6.6"
KILL_ALL = _ChildProcessObserver._terminate_all
# Private methods of Lightning's classes that subclasses in this package call or override.
OVERRIDDEN: dict[type, tuple[str, ...]] = {
    # Called by the trainer for `ckpt_path="last"`.
    ModelCheckpoint: ("_find_last_checkpoints",),
    LightningCLI: (
        "_get",
        "_instantiate_trainer",
        "_parse_ckpt_path",
        "_parser",
        "_prepare_subcommand_kwargs",
        "_run_subcommand",
        "_set_seed",
    ),
}


# `Any` below: Lightning's type of checkpoints, and the other arguments of its methods.
def dump_checkpoint(trainer: pl.Trainer) -> State:
    """Return a run's state as ``Trainer.save_checkpoint`` writes it; all ranks must call it.

    We do not call ``save_checkpoint``, because it also writes the state, and in place.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def before_restore(trainer: pl.Trainer, check: Callable[[str | None], None]) -> None:
    """Call ``check(path)`` on every process before any of them reads its checkpoint.

    Lightning has no hook that runs after every process knows its path (or None) and before any of
    them reads it.
    """
    connector = trainer._checkpoint_connector
    restore = type(connector)._restore_modules_and_callbacks

    def checked(checkpoint_path: str | Path | None = None, *args: Any, **kwargs: Any) -> None:
        check(None if checkpoint_path is None else str(checkpoint_path))
        restore(connector, checkpoint_path, *args, **kwargs)

    connector._restore_modules_and_callbacks = checked  # type: ignore[method-assign]


def before_load(strategy: Strategy, check: Callable[[str], None]) -> None:
    """Call ``check(path)`` before a strategy reads a checkpoint.

    No hook of Lightning gets the path before that.
    """
    load = type(strategy).load_checkpoint

    def checked(checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        check(str(checkpoint_path))
        return load(strategy, checkpoint_path, *args, **kwargs)

    strategy.load_checkpoint = checked  # type: ignore[method-assign]


def validates_next(trainer: pl.Trainer) -> bool:
    """Return whether a validation follows the training batch that ends now."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def val_check_seconds(trainer: pl.Trainer) -> float | None:
    """Return the time between validations if ``val_check_interval`` is a time, else None."""
    seconds: float | None = trainer._val_check_time_interval  # type: ignore[attr-defined]
    return seconds


def stop_after_validation(stopping: EarlyStopping) -> None:
    """Let EarlyStopping look at its metric after each validation, not at the end of an epoch.

    Its argument ``check_on_train_epoch_end=False`` does the same, but the user builds it.
    """
    stopping._check_on_train_epoch_end = False


def saves_shards(strategy: Strategy) -> bool:
    """Return whether a strategy writes checkpoints as folders of shards."""
    return isinstance(strategy, ModelParallelStrategy) and bool(
        strategy._save_distributed_checkpoint
    )


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the number of data-parallel processes before the strategy builds its device mesh.

    The constructor takes this number, but does not know the number of processes yet.
    """
    strategy._data_parallel_size = size


def load_weights(
    path: Path, strategy: ModelParallelStrategy, weights_only: bool | None
) -> dict[str, Any]:
    """Load a checkpoint's weights into a strategy's sharded model.

    Returns:
        The checkpoint without the weights.
    """
    assert strategy.model is not None and strategy.lightning_module is not None
    return _load_checkpoint(
        path=path,
        state={"state_dict": strategy.model},
        strict=strategy.lightning_module.strict_loading,
        weights_only=weights_only,
    )


def finds_unused_parameters(strategy: DDPStrategy) -> bool:
    """Return whether DDP looks for parameters without a gradient."""
    return bool(strategy._ddp_kwargs.get("find_unused_parameters"))


def handles_failure() -> bool:
    """Return whether the main thread is in Lightning's error handling, e.g. ``on_exception``."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code is not _interrupt.__code__:
        frame = frame.f_back
    return frame is not None


def on_child_failure(
    act: Callable[[Sequence[Popen[bytes]], Callable[[], None]], None],
) -> None:
    """Replace what Lightning's launcher does when a process that it started fails.

    Args:
        act: takes the processes, and a function that does what Lightning would do.
    """

    def terminate(observer: _ChildProcessObserver) -> None:
        act(observer._child_processes, lambda: KILL_ALL(observer))

    _ChildProcessObserver._terminate_all = terminate  # type: ignore[method-assign, assignment]
