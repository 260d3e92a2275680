"""Weights in files, one tensor at a time: the trainer writes them, a server reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 1 << 30


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path | None) -> None:
    """Write tensors to files of about a gigabyte; None: only take them from the iterator.

    Args:
        tensors: name and value, one at a time.
        folder: exists and is empty.
    """
    shard: dict[str, Tensor] = {}
    count = 0
    for name, tensor in tensors:
        if folder is None:
            continue
        # A copy: tied tensors share memory, which the format refuses.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            save_file(shard, folder / f"{count:05d}.safetensors")
            shard, count = {}, count + 1
    if folder is not None and shard:
        save_file(shard, folder / f"{count:05d}.safetensors")


def read_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder.

    Raises:
        FileNotFoundError: it holds none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no weights in {folder}: is it on a shared file system?")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)
