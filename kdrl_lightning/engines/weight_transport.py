"""Sends weights from the trainer to vLLM servers: the interface, and a version that uses files."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from kdrl_lightning.common.distributed import agree
from kdrl_lightning.engines.http_client import AwayError, ServerClient
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.engines.weight_files import write_shards
from kdrl_lightning.errors import TrainingStopped


class WeightRoute(ABC):
    """Sends weights to servers, whose RPC method ``student`` then returns the weights' label."""

    @abstractmethod
    def push(self, weights: HubWeights, servers: Sequence[ServerClient], label: str) -> None:
        """Send the weights to all servers; all ranks must call it, but only the first one sends.

        Args:
            weights: weights of the student.
            servers: the servers.
            label: a unique name of these weights.

        Raises:
            TrainingStopped: the disk is full, or a server refuses the weights (then on the first
                rank alone).
        """

    @abstractmethod
    def again(self, server: ServerClient, label: str) -> None:
        """Send the weights of the last push to a restarted server; one rank may call it alone.

        Raises:
            AwayError: sending may work later.
            TrainingStopped: the server refuses the weights.
        """


class FileRoute(WeightRoute):
    """Writes weights to files, which each server loads; a restarted server loads them again.

    Args:
        folder: a folder on a file system that trainer and servers share; None: a temporary folder
            of this machine.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self._current = ""

    def push(self, weights: HubWeights, servers: Sequence[ServerClient], label: str) -> None:
        """Write the weights and let every server load them; see ``WeightRoute.push``."""
        rank, world = ranks()
        made, failure = [""], None
        try:
            made[0] = self._write(weights, rank == 0)
        except Exception as error:  # `agree` raises it on every rank, or the others would wait
            failure = error
        agree(failure)
        if world > 1:
            torch.distributed.broadcast_object_list(made)
        old, self._current = self._current, made[0]
        if rank:
            return
        weakref.finalize(self, shutil.rmtree, self._current, ignore_errors=True)
        try:
            with ThreadPoolExecutor(len(servers)) as pool:
                list(pool.map(lambda s: s.patiently(lambda: self.again(s, label)), servers))
        finally:
            if old:
                shutil.rmtree(old, ignore_errors=True)

    def _write(self, weights: HubWeights, writes: bool) -> str:
        """Write the weights to a new folder and return its path; return "" on the other ranks."""
        tensors, folder = weights.tensors(), ""
        try:
            if writes:
                folder = tempfile.mkdtemp(prefix="kdrl-weights-", dir=self.folder)
            write_shards(tensors, Path(folder) if writes else None)
        except Exception as error:
            for _ in tensors:  # the other ranks still gather a sharded student with this one
                pass
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, OSError | SafetensorError):
                raise
            raise TrainingStopped(
                "`weights_folder` must have room for the student's weights: got "
                f"{type(error).__name__}: {error} in {self.folder or tempfile.gettempdir()}. Make "
                "room, or name a folder on another disk."
            ) from error
        return folder

    def again(self, server: ServerClient, label: str) -> None:
        """Make a server load the files of the last push; see ``WeightRoute.again``."""
        with paused(server):
            answers = server.rpc("load_student", self._current, label)
        for answer in answers:
            if "error" in answer:
                raise server.stopped("load_student", answer["error"])


@contextmanager
def paused(server: ServerClient) -> Iterator[None]:
    """Pause a server inside the context, which sends weights, and then empty its prefix cache.

    The server first finishes its running requests.

    Raises:
        AwayError: the prefix cache is still in use.
    """
    server.post("/pause?mode=wait")
    try:
        yield
        if not server.post("/reset_prefix_cache")["success"]:
            raise AwayError("its prefix cache is still in use")
    finally:
        server.post("/resume")


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; ``(0, 1)`` without a process group."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
