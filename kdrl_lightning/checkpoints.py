"""Checkpoints on disk: written whole or not at all, and checked before they are read.

A checkpoint is one file, or under ``fsdp2`` a folder of shards, in Lightning's own formats: it is
read by Lightning. Only writing is ours, because Lightning's strategies write folders in place, so
that a kill in between leaves a broken one, and know no asynchronous folder.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.utils import _pytree as pytree

from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.rollout.together import stop_together

SHARDS, META = ".metadata", "meta.pt"
# What the index of shards may be made of; it is a pickle, and torch would run any other.
INDEX_NAMES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class CheckpointWriter:
    """Writes a trainer's checkpoints; all ranks call every method.

    Args:
        asynchronous: copy the state to host memory, and write it while training goes on.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._threads: ThreadPoolExecutor | None = None
        self._group: Any = None
        self._pending: tuple[Future[Any], Callable[[], None]] | None = None

    def write(self, trainer: Any, path: Path) -> None:
        """Write the run as it is now to ``path``; an earlier write is waited for.

        Raises:
            TrainingStopped: on every rank, where one cannot write.
        """
        self.wait(trainer)
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if is_sharded(trainer.strategy):
            self._write_folder(trainer, state, path)
        else:
            self._write_file(trainer, state, path)
        if not self.asynchronous:
            self.wait(trainer)

    def wait(self, trainer: Any) -> None:
        """Wait for what is being written."""
        if self._pending is None:
            return
        (future, finish), self._pending = self._pending, None
        together(trainer, future.result)
        together(trainer, finish)
        trainer.strategy.barrier()

    def _write_file(self, trainer: Any, state: dict[str, Any], path: Path) -> None:
        if not trainer.is_global_zero:
            self._pending = _done(), lambda: None
            return
        if self.asynchronous:
            state = pytree.tree_map_only(Tensor, on_cpu, state)
            self._threads = self._threads or ThreadPoolExecutor(1)
            self._pending = self._threads.submit(save_file, state, path), lambda: None
        else:
            self._pending = _done(), lambda: save_file(state, path)

    def _write_folder(self, trainer: Any, state: dict[str, Any], path: Path) -> None:
        half, first = unfinished(path), trainer.is_global_zero
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
                sync(half)
                old = unfinished(path.with_name(path.name + ".old"))
                if path.exists():
                    os.replace(path, old)
                os.replace(half, path)
                sync(path.parent)
                shutil.rmtree(old, ignore_errors=True)

        together(trainer, prepare)
        if self.asynchronous:
            # Shards may be written through the CPU's backend only, aside of the training's own.
            self._group = self._group or torch.distributed.new_group(backend="gloo")
            future = dcp.async_save(  # type: ignore[attr-defined]
                tensors, checkpoint_id=half, process_group=self._group
            )
            self._pending = future, finish  # type: ignore[assignment]
        else:
            together(
                trainer,
                lambda: dcp.save(tensors, checkpoint_id=half),  # type: ignore[attr-defined]
            )
            self._pending = _done(), finish


def together(trainer: Any, work: Callable[[], Any]) -> None:
    """Run work that touches the disk; if it fails on one rank, all stop."""

    def tried() -> None:
        try:
            work()
        except (Exception, CheckpointException) as error:
            cause: BaseException = error
            if isinstance(error, CheckpointException):  # torch's, of all ranks
                cause = next(iter(error.failures.values()))[0]
            raise TrainingStopped(
                f"a checkpoint must be writable: got {type(cause).__name__}: {cause} at step "
                f"{trainer.global_step}. Earlier checkpoints are whole; make room, or mend the "
                "folder, and resume."
            ) from error

    stop_together(tried, trainer.lightning_module.reduce)


def on_cpu(value: Tensor) -> Tensor:
    """Copy a tensor, so that training may change it."""
    return value.detach().to("cpu", copy=True)


def save_file(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` to ``path``, or leave what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = unfinished(path)
    with half.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)
    sync(path.parent)


def unfinished(path: Path) -> Path:
    """Name of a checkpoint while it is written."""
    return path.with_name(path.name + ".unfinished")


def remove_unfinished(folder: Path) -> None:
    """Delete what killed runs left half-written in a folder."""
    for path in folder.glob("*.unfinished"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync(folder: Path) -> None:
    """Make a folder's entries durable, so that a power cut does not undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_sharded(strategy: Any) -> bool:
    """Whether a strategy's checkpoints are folders."""
    parallel = isinstance(strategy, ModelParallelStrategy)
    return parallel and bool(strategy._save_distributed_checkpoint)


def read_metadata(path: str) -> dict[str, Any]:
    """Read a checkpoint without the weights of a folder; a file's tensors stay on disk.

    Raises:
        ConfigurationError: it is not there, broken, or holds more than tensors and plain values.
    """
    place = Path(path)
    try:
        if place.is_dir():
            check_shards(place)
            place = place / META
        values = torch.load(place, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]
        raise ConfigurationError(
            f"`ckpt_path` must be a whole checkpoint of this library: got {path} ({reason}). "
            "Take an earlier one."
        ) from error
    if not isinstance(values, dict) or "loops" not in values:
        raise ConfigurationError(
            f"`ckpt_path` must be a checkpoint of a run: got {path}, which holds none. "
            "A folder of weights is a model: give it as `model.student`."
        )
    return values


def check_readable(path: str, strategy: Any) -> None:
    """Check that a strategy reads this form of checkpoint.

    Raises:
        ConfigurationError: it is a folder of shards, and the strategy holds whole models.
    """
    if Path(path).is_dir() and not isinstance(strategy, ModelParallelStrategy):
        raise ConfigurationError(
            f"`ckpt_path` must be a file for {type(strategy).__name__}: got {path}, a folder of "
            "shards. Go on with `--trainer.strategy fsdp2` on any number of processes, or start "
            "from its `export`."
        )


def check_shards(folder: Path) -> None:
    """Check that the shards of a folder are all there, and safe to read.

    Raises:
        ValueError: they are not there.
        UnpicklingError: index or shards hold more than an index, tensors and plain values.
    """
    for name in (SHARDS, META):
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing: it was not finished")
    try:
        with (folder / SHARDS).open("rb") as file:
            index = _IndexReader(file).load()
        parts, entries = index.storage_data, index.state_dict_metadata
    except (AttributeError, ImportError, LookupError, TypeError) as error:
        raise ValueError(f"its index cannot be read: {error!r}") from error
    for key, part in parts.items():
        file_path = folder / part.relative_path
        size = file_path.stat().st_size if file_path.is_file() else -1
        if size < part.offset + part.length:
            raise ValueError(f"{part.relative_path} has {size} bytes, too few")
        if isinstance(entries[key.fqn], BytesStorageMetadata):
            # torch would unpickle it without asking what it is.
            with file_path.open("rb") as file:
                file.seek(part.offset)
                torch.load(io.BytesIO(file.read(part.length)), weights_only=True)


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        kind = isinstance(vars(torch).get(name), torch.dtype) and module == "torch"
        if not kind and name not in INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"its index names {module}.{name}")
        return super().find_class(module, name)


def _done() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(None)
    return future
