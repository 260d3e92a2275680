"""Reads checkpoints, after checking that they are intact and safe.

A checkpoint is one file, or under ``fsdp2`` a folder of shards, in Lightning's formats.
Lightning loads the weights; these checks run before that.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from kdrl_lightning.checkpoints.integrity import Part, check_archive, check_seal
from kdrl_lightning.checkpoints.layout import META, SHARDS
from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import ConfigurationError

# The only names that an index of shards may use: it is a pickle, and torch would run code in it.
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


# `Any`: the values of a checkpoint, as torch and Lightning type them.
def read_metadata(path: str) -> State:
    """Return a checkpoint's content, but not a folder's weights; tensors stay on disk.

    Before that, it verifies the checkpoint's checksums, which cover every byte.

    Raises:
        ConfigurationError: it is missing or damaged, or holds more than tensors and plain values.
    """
    values, damage = _read(Path(path))
    if damage:
        place = Path(path).absolute()
        earlier = newest_whole(p for p in place.parent.glob("step=*.ckpt") if p != place)[0]
        cure = "Use an earlier one of another run: this folder holds no other intact one."
        if earlier is not None:
            cure = f"Use an earlier one: `--ckpt_path {earlier}`."
        raise ConfigurationError(
            f"`ckpt_path` must be an intact checkpoint of this library: got {path} ({damage}). "
            f"{cure}"
        )
    if not isinstance(values, dict) or "loops" not in values:
        raise ConfigurationError(
            f"`ckpt_path` must be a checkpoint of a run: got {path}, which holds none. "
            "A folder of weights is a model: give it as `model.student`."
        )
    return values


def newest_whole(paths: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """Find the newest intact checkpoint among some paths.

    Returns:
        Its path, None if there is none; and a description of the damage for each newer one.
    """
    broken: list[str] = []
    for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        damage = _read(path)[1]
        if not damage:
            return path, broken
        broken.append(f"{path} ({damage})")
    return None, broken


def _read(place: Path) -> tuple[Any, str]:
    """Return a checkpoint's content without a folder's weights, and a description of damage."""
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
    """Return a checksum of a checkpoint's stored checksums; None if it cannot be read."""
    if path is None:
        return None
    place = Path(path)
    try:
        with zipfile.ZipFile(place / META if place.is_dir() else place) as archive:
            return str(zlib.crc32(str([r.CRC for r in archive.infolist()]).encode()))
    except (OSError, ValueError, zipfile.BadZipFile):  # reading the checkpoint reports the error
        return None


def check_readable(path: str, strategy: Strategy) -> None:
    """Check that a strategy can read this form of checkpoint.

    Raises:
        ConfigurationError: it is a folder of shards, and the strategy holds whole models.
    """
    if Path(path).is_dir() and not isinstance(strategy, ModelParallelStrategy):
        raise ConfigurationError(
            f"`ckpt_path` must be a file for {type(strategy).__name__}: got {path}, a folder of "
            "shards. Continue with `--trainer.strategy fsdp2` on any number of processes, or "
            "export the student and start from it."
        )


def check_shards(folder: Path) -> None:
    """Check that all shards of a folder are there, intact, and safe to read.

    Raises:
        ValueError: some are missing or damaged.
        UnpicklingError: index or shards hold more than an index, tensors and plain values.
    """
    for name in (SHARDS, META):
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing: the run did not finish it")
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
                # torch would unpickle any object from it.
                view.seek(0)
                torch.load(io.BytesIO(view.read()), weights_only=True)


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        kind = isinstance(vars(torch).get(name), torch.dtype) and module == "torch"
        if not kind and name not in INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"its index names {module}.{name}")
        return super().find_class(module, name)
