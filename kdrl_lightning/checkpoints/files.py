"""Checkpoints on disk: written whole or not at all, and checked before they are read.

A checkpoint is one file, or under ``fsdp2`` a folder of shards, in Lightning's own formats: it is
read by Lightning. Only writing is ours, because Lightning's strategies write folders in place, so
that a kill in between leaves a broken one, and know no asynchronous folder.
"""

from __future__ import annotations

import io
import os
import pickle
import shlex
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.utils import _pytree as pytree

from kdrl_lightning.checkpoints.integrity import Part, check_archive, check_seal, seal, sync
from kdrl_lightning.distributed import stop_together
from kdrl_lightning.errors import ConfigurationError, TrainingStopped

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
        self._half: Path | None = None  # the folder that is being written
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
        self._together(trainer, future.result)
        self._together(trainer, finish)
        trainer.strategy.barrier()

    def _together(self, trainer: Any, work: Callable[[], Any]) -> None:
        try:
            together(trainer, work)
        except TrainingStopped:  # half a checkpoint would keep a full disk full
            if trainer.is_global_zero and self._half is not None:
                shutil.rmtree(self._half, ignore_errors=True)
            raise

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
                old = unfinished(path.with_name(path.name + ".old"))
                if path.exists():
                    os.replace(path, old)
                os.replace(half, path)
                sync(path.parent)
                shutil.rmtree(old, ignore_errors=True)

        self._together(trainer, prepare)
        if self.asynchronous:
            # Shards may be written through the CPU's backend only, aside of the training's own.
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


def together(trainer: Any, work: Callable[[], Any]) -> None:
    """Run work that touches the disk; if it fails on one rank, all stop."""

    def tried() -> None:
        try:
            work()
        except (Exception, CheckpointException) as error:
            raise TrainingStopped(
                f"a checkpoint must be writable: got {reason_of(error)} at step "
                f"{trainer.global_step}. Earlier checkpoints are whole; make room, or mend the "
                "folder, and resume."
            ) from error

    stop_together(tried, trainer.lightning_module.reduce)


def export_together(trainer: Any, write: Callable[[], None], path: str) -> None:
    """Write the student; if the first rank cannot, all stop.

    Raises:
        TrainingStopped: on every rank; the message says which checkpoint holds the student.
    """

    def tried() -> None:
        try:
            write()
        except Exception as error:
            raise not_exported(trainer, path, error) from error

    stop_together(tried, trainer.lightning_module.reduce)


def not_exported(trainer: Any, path: str, error: BaseException) -> TrainingStopped:
    """Return the error of a student that could not be written, with the command that writes it."""
    callback = trainer.checkpoint_callback
    names = ("last_model_path", "best_model_path")  # Lightning's own may know the best alone
    saved = next(filter(None, (getattr(callback, name, "") for name in names)), None)
    cure = "The run saved no checkpoint: make room, and train again with checkpoints."
    if saved is not None:
        flags = shlex.join(["--ckpt_path", str(saved), "--output", path])
        cure = f"Make room, and run `python -m kdrl_lightning export {flags}`."
    return TrainingStopped(
        f"the student must be writable to {path}: got {reason_of(error)}. {cure}"
    )


def reason_of(error: BaseException) -> str:
    """Say in one line why something could not be written."""
    cause = cause_of(error)
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def cause_of(error: BaseException) -> BaseException:
    """Return the system's error, e.g. of a full disk, which torch hides in one of its own."""
    if isinstance(error, CheckpointException):  # of all ranks
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


class ShardWriter(FileSystemWriter):
    """Writes shards, and tells the other ranks the system's error.

    What is sent to them loses its causes on the way.
    """

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write a rank's shards."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise cause_of(error) from None


def on_cpu(value: Tensor) -> Tensor:
    """Copy a tensor, so that training may change it."""
    return value.detach().to("cpu", copy=True)


def save_file(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` to ``path``, or leave what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = unfinished(path)
    try:
        with half.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except Exception:  # half a checkpoint would keep a full disk full
        half.unlink(missing_ok=True)
        raise
    sync(path.parent)


def unfinished(path: Path) -> Path:
    """Name of a checkpoint while it is written."""
    return path.with_name(path.name + ".unfinished")


def remove_unfinished(folder: Path) -> None:
    """Delete what killed runs left half-written in a folder."""
    for path in folder.glob("*.unfinished"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_sharded(strategy: Any) -> bool:
    """Whether a strategy's checkpoints are folders."""
    parallel = isinstance(strategy, ModelParallelStrategy)
    return parallel and bool(strategy._save_distributed_checkpoint)


def read_metadata(path: str) -> dict[str, Any]:
    """Read a checkpoint without the weights of a folder; a file's tensors stay on disk.

    Every byte is compared with the checkpoint's checksums.

    Raises:
        ConfigurationError: it is not there, broken, or holds more than tensors and plain values.
    """
    values, damage = _read(Path(path))
    if damage:
        place = Path(path).absolute()
        earlier = newest_whole(p for p in place.parent.glob("step=*.ckpt") if p != place)[0]
        cure = "Take an earlier one of another run: its folder holds no other whole one."
        if earlier is not None:
            cure = f"Take an earlier one: `--ckpt_path {earlier}`."
        raise ConfigurationError(
            f"`ckpt_path` must be a whole checkpoint of this library: got {path} ({damage}). {cure}"
        )
    if not isinstance(values, dict) or "loops" not in values:
        raise ConfigurationError(
            f"`ckpt_path` must be a checkpoint of a run: got {path}, which holds none. "
            "A folder of weights is a model: give it as `model.student`."
        )
    return values


def newest_whole(paths: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """Find the newest whole one of some checkpoints.

    Returns:
        Its path, None if there is none; and for each newer one what is broken about it.
    """
    broken: list[str] = []
    for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        damage = _read(path)[1]
        if not damage:
            return path, broken
        broken.append(f"{path} ({damage})")
    return None, broken


def _read(place: Path) -> tuple[Any, str]:
    """Return what a checkpoint holds but the weights of a folder, and what is broken about it."""
    try:
        if place.is_dir():
            check_shards(place)
            place = place / META
        with place.open("rb") as file:
            check_archive(file, place.name)
        return torch.load(place, map_location="cpu", mmap=True, weights_only=True), ""
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        return None, (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]


def content_mark(path: str | None) -> str | None:
    """Return what tells a checkpoint from others, without its weights; None: there is none."""
    if path is None:
        return None
    place = Path(path)
    try:
        with zipfile.ZipFile(place / META if place.is_dir() else place) as archive:
            return str(zlib.crc32(str([r.CRC for r in archive.infolist()]).encode()))
    except (OSError, ValueError, zipfile.BadZipFile):  # refused when it is read
        return None


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
        ValueError: they are not there, or damaged.
        UnpicklingError: index or shards hold more than an index, tensors and plain values.
    """
    for name in (SHARDS, META):
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing: it was not finished")
    try:
        raw = (folder / SHARDS).read_bytes()
        check_seal(raw, SHARDS)
        index = _IndexReader(io.BytesIO(raw)).load()
        parts, entries = index.storage_data, index.state_dict_metadata
    except (AttributeError, ImportError, LookupError, TypeError) as error:
        raise ValueError(f"its index cannot be read: {error!r}") from error
    for key, part in parts.items():
        file_path = folder / part.relative_path
        size = file_path.stat().st_size if file_path.is_file() else -1
        if size < part.offset + part.length:
            raise ValueError(f"{part.relative_path} has {size} bytes, too few")
        with file_path.open("rb") as file:
            view = Part(file, part.offset, part.length)
            check_archive(view, part.relative_path)
            if isinstance(entries[key.fqn], BytesStorageMetadata):
                # torch would unpickle it without asking what it is.
                view.seek(0)
                torch.load(io.BytesIO(view.read()), weights_only=True)


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
