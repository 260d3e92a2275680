"""How weights get from the trainer to the servers: the protocol, and the way through files."""

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

from kdrl_lightning.engines.http_client import AwayError, ServerClient
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.engines.weight_files import write_shards
from kdrl_lightning.errors import TrainingStopped


class WeightRoute(ABC):
    """Brings weights to servers; each then answers ``student`` with their label."""

    @abstractmethod
    def push(self, weights: HubWeights, servers: Sequence[ServerClient], label: str) -> None:
        """Bring the weights to all servers; all ranks must call it, the first one works.

        Raises:
            TrainingStopped: on the first rank, if the disk or a server does not take them.
        """

    @abstractmethod
    def again(self, server: ServerClient, label: str) -> None:
        """Bring the weights of the last push to a server that was restarted; not collective.

        Raises:
            AwayError: it may work later.
            TrainingStopped: it will not.
        """


class FileRoute(WeightRoute):
    """The trainer writes files, each server loads them; a restarted one loads them again.

    Args:
        folder: on a file system that trainer and servers see; None: a temporary one.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self._current = ""

    def push(self, weights: HubWeights, servers: Sequence[ServerClient], label: str) -> None:
        """Write, and let every server load; see ``WeightRoute.push``."""
        rank, world = ranks()
        made, failure = [""], None
        try:
            made[0] = self._write(weights, rank == 0)
        except TrainingStopped as error:
            failure = error
        if world > 1:
            torch.distributed.broadcast_object_list(made)
        if failure is not None:
            raise failure
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
        """Write the weights to a new folder; return its path, "" on the other ranks."""
        tensors, folder = weights.tensors(), ""
        try:
            if writes:
                folder = tempfile.mkdtemp(prefix="kdrl-weights-", dir=self.folder)
            write_shards(tensors, Path(folder) if writes else None)
        except (OSError, SafetensorError) as error:
            for _ in tensors:  # reading a sharded student is a collective: the others wait for it
                pass
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingStopped(
                "`weights_folder` must have room for the student's weights: got "
                f"{type(error).__name__}: {error} in {self.folder or tempfile.gettempdir()}. Make "
                "room, or name a folder on another disk."
            ) from error
        return folder

    def again(self, server: ServerClient, label: str) -> None:
        """Let a server load the files; see ``WeightRoute.again``."""
        with paused(server):
            answers = server.rpc("load_student", self._current, label)
        for answer in answers:
            if "error" in answer:
                raise server.stopped("load_student", answer["error"])


@contextmanager
def paused(server: ServerClient) -> Iterator[None]:
    """Let a server finish what it samples and take weights; empty its prefix cache behind that."""
    server.post("/pause?mode=wait")
    try:
        yield
        if not server.post("/reset_prefix_cache")["success"]:
            raise AwayError("its prefix cache is still in use")
    finally:
        server.post("/resume")


def ranks() -> tuple[int, int]:
    """Return this process's rank, and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
