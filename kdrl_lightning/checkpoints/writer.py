"""Writes each checkpoint completely or not at all.

A checkpoint is one file, or under ``fsdp2`` a folder of shards, in Lightning's formats, and
Lightning reads it. We write it ourselves, because Lightning's strategies write folders in place (a
killed run leaves a damaged one) and cannot write them asynchronously.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture
from torch.utils import _pytree as pytree

from kdrl_lightning.checkpoints.integrity import seal, sync
from kdrl_lightning.checkpoints.layout import META, SHARDS, unfinished
from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.common.folders import replace_folder
from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.trainer.failures import cause_of, reason_of
from kdrl_lightning.trainer.internals import dump_checkpoint, saves_shards
from kdrl_lightning.trainer.protocols import trained


class CheckpointWriter:
    """Writes a trainer's checkpoints; all ranks call every method.

    Args:
        asynchronous: copy the state to host memory, and write it while training continues.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._threads: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._half: Path | None = None  # the folder that is being written
        self._pending: tuple[Future[Any], Callable[[], None]] | None = None  # `Any`: torch's result

    def write(self, trainer: pl.Trainer, path: Path) -> None:
        """Write the run's current state to ``path``, after any earlier write has ended.

        Raises:
            TrainingStopped: on every rank, if one cannot write.
        """
        self.wait(trainer)
        state = dump_checkpoint(trainer)
        if saves_shards(trainer.strategy):
            self._write_folder(trainer, state, path)
        else:
            self._write_file(trainer, state, path)
        if not self.asynchronous:
            self.wait(trainer)

    def wait(self, trainer: pl.Trainer) -> None:
        """Wait until the current write has ended."""
        if self._pending is None:
            return
        (future, finish), self._pending = self._pending, None
        self._together(trainer, future.result)
        self._together(trainer, finish)
        trainer.strategy.barrier()

    def _together(self, trainer: pl.Trainer, work: Callable[[], object]) -> None:
        try:
            together(trainer, work)
        except TrainingStopped:  # an unfinished one would keep the disk full
            if trainer.is_global_zero and self._half is not None:
                shutil.rmtree(self._half, ignore_errors=True)
            raise

    def _write_file(self, trainer: pl.Trainer, state: State, path: Path) -> None:
        if not trainer.is_global_zero:
            self._pending = _done(), lambda: None
            return
        if self.asynchronous:
            state = pytree.tree_map_only(Tensor, on_cpu, state)
            self._threads = self._threads or ThreadPoolExecutor(1)
            self._pending = self._threads.submit(save_file, state, path), lambda: None
        else:
            self._pending = _done(), lambda: save_file(state, path)

    def _write_folder(self, trainer: pl.Trainer, state: State, path: Path) -> None:
        self._half = half = unfinished(path)
        first = trainer.is_global_zero
        tensors = {"state_dict": state.pop("state_dict")}
        for index, moments in enumerate(state.pop("optimizer_states")):
            tensors[f"optimizer_{index}"] = moments

        def prepare() -> None:
            if first:
                shutil.rmtree(half, ignore_errors=True)
                half.mkdir(parents=True)
                save_file(state, half / META)

        def finish() -> None:
            if first:
                seal(half / SHARDS)
                sync(half)
                replace_folder(half, path)
                sync(path.parent)

        self._together(trainer, prepare)
        if self.asynchronous:
            # torch writes shards in the background only with a CPU backend: make a second group.
            self._group = self._group or torch.distributed.new_group(backend="gloo")
            future = dcp.async_save(  # type: ignore[attr-defined]
                tensors, storage_writer=ShardWriter(half), process_group=self._group
            )
            self._pending = future, finish  # type: ignore[assignment]
        else:
            self._together(
                trainer,
                lambda: dcp.save(tensors, storage_writer=ShardWriter(half)),  # type: ignore[attr-defined]
            )
            self._pending = _done(), finish


def together(trainer: pl.Trainer, work: Callable[[], object]) -> None:
    """Run work that writes to disk; if it fails on one rank, all ranks raise TrainingStopped."""

    def tried() -> None:
        try:
            work()
        except (Exception, CheckpointException) as error:
            raise TrainingStopped(
                f"a checkpoint must be writable: got {reason_of(error)} at step "
                f"{trainer.global_step}. Earlier checkpoints are intact; make room, or repair "
                "the folder, and resume."
            ) from error

    stop_together(tried, trained(trainer.lightning_module).reduce)


class ShardWriter(FileSystemWriter):
    """Writes shards, and raises the operating system's error if that fails.

    torch sends the raised error to the other ranks, but not its causes.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write the shards of this rank."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise cause_of(error) from None


def save_file(state: State, path: Path) -> None:
    """Write ``state`` to ``path``; if that fails, an earlier file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = unfinished(path)
    try:
        with half.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except BaseException:  # half a checkpoint would keep the disk full, after Ctrl-C, too
        half.unlink(missing_ok=True)
        raise
    sync(path.parent)


def on_cpu(value: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU, so that training may change the tensor."""
    return value.detach().to("cpu", copy=True)


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
