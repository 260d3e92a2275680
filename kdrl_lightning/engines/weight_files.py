"""Weight files: the trainer writes them and a server reads them, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 1 << 30


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path | None) -> None:
    """Write tensors to safetensors files of about a gigabyte.

    Args:
        tensors: yields names and values, one at a time.
        folder: an existing, empty folder; None reads all tensors and writes nothing.
    """
    shard: dict[str, Tensor] = {}
    count = 0
    for name, tensor in tensors:
        if folder is None:
            continue
        # A copy, because safetensors refuses tied tensors, which share memory.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            save_file(shard, folder / f"{count:05d}.safetensors")
            shard, count = {}, count + 1
    if folder is not None and shard:
        save_file(shard, folder / f"{count:05d}.safetensors")


def read_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of all tensors in a folder.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"`weights_folder` must be on a file system that trainer and servers share: got no "
            f"weights in {folder}. Name another folder."
        )
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)
