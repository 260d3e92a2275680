"""Detects damaged checkpoints by their checksums, and replaces folders only when complete.

``torch.save`` writes zip archives with a CRC-32 per record, and the shards of a folder hold such an
archive per tensor; ``torch.load`` checks none of these. The index of shards has no checksum, so we
append one after its last byte, where pickle stops reading.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch

CONFIGS = ("config.json", "adapter_config.json")  # a folder with one of these holds a model
SEAL = b"\nkdrl_lightning crc32 "


class Part(io.RawIOBase):
    """Reads a part of a file as if it were a file.

    Args:
        file: the whole file.
        offset: start of the part, in bytes.
        length: length of the part, in bytes.
    """

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position in the part, and return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError("the position must not be before the start of the part")
        self._place = start + offset
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """Return the next ``size`` bytes, or all bytes up to the end of the part."""
        left = max(0, self._length - self._place)
        self._file.seek(self._offset + self._place)
        raw = self._file.read(left if size is None or size < 0 else min(size, left))
        self._place += len(raw)
        return raw

    def readinto(self, buffer: Any) -> int:  # typeshed's buffer type has no length
        """Fill a buffer with the next bytes."""
        raw = self.read(len(buffer))
        buffer[: len(raw)] = raw
        return len(raw)


def check_archive(file: IO[bytes] | Part, name: str) -> None:
    """Compare every record of an archive of ``torch.save`` with its checksum.

    Args:
        file: open archive, or part of a file. It is read once, at about 3 to 5 GB/s.
        name: name of the file, for the message.

    Raises:
        ValueError: it is truncated, or its bytes are not those that were written.
    """
    try:
        with zipfile.ZipFile(cast(IO[bytes], file)) as archive:
            record = archive.testzip()
        file.seek(0)
        # torch's reader is stricter about bytes outside the records.
        torch._C.PyTorchFileReader(cast(IO[bytes], file))
    except Exception as error:  # a damaged header makes zipfile raise many types
        text = str(error).partition(". ")[0]
        raise ValueError(f"{name} is cut short or damaged: {text}") from error
    if record is not None:
        raise ValueError(f"{name} is damaged: {record} does not match its checksum")


def seal(path: Path) -> None:
    """Write the checksum of a pickle after its last byte."""
    checksum = zlib.crc32(path.read_bytes())
    with path.open("ab") as file:
        file.write(SEAL + b"%08x" % checksum)
        file.flush()
        os.fsync(file.fileno())


def check_seal(raw: bytes, name: str) -> None:
    """Compare a pickle with its checksum, which files of earlier versions lack.

    Raises:
        ValueError: the bytes are not those that were written.
    """
    body, found, checksum = raw.rpartition(SEAL)
    if found and b"%08x" % zlib.crc32(body) != checksum:
        raise ValueError(f"{name} is damaged: it does not match its checksum")


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk.

    Otherwise a power cut can undo a rename, or keep the new name without the bytes.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder for a model, and move the complete model to ``path`` at the end.

    If writing fails, a model that was in ``path`` stays as it was. Other files there always stay.

    Yields:
        The folder to write to.
    """
    path = Path(os.path.abspath(path))  # "." has no name, and ".." a wrong one
    inside = path.is_dir()
    half = path / "unfinished" if inside else path.with_name(f"{path.name}.unfinished")
    try:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        yield half
        for file in half.rglob("*"):
            sync(file)
        if inside:
            _move(half, path)
        else:
            os.replace(half, path)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    sync(path.parent)


def _move(half: Path, path: Path) -> None:
    """Replace the model in a folder; a kill in between leaves no model, never a mix of two."""
    for name in CONFIGS:
        (path / name).unlink(missing_ok=True)
    for file in path.glob("*.safetensors*"):  # the earlier model may have more shards
        file.unlink()
    for file in sorted(half.iterdir(), key=lambda f: f.name in CONFIGS):
        if file.is_dir():
            shutil.rmtree(path / file.name, ignore_errors=True)
        os.replace(file, path / file.name)
    half.rmdir()
    sync(path)
