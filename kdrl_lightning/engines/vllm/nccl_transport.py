"""Weights by vLLM's weight-transfer API: from GPU to GPU, without files.

The other module that imports vLLM, and only where this way is taken.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

from kdrl_lightning.engines.http_client import AwayError, ServerClient
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.engines.weight_transport import WeightRoute, paused, ranks
from kdrl_lightning.errors import TrainingStopped


class TransferRoute(WeightRoute):
    """The first rank sends tensor by tensor to one server after the other.

    A restarted server cannot get them again before the next push: that is an error. The others
    ranks only take part in the gathering.

    Args:
        backend: which the servers have been started with.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._source = Source()
        self._engines: dict[str, Any] = {}

    def push(self, weights: HubWeights, servers: Sequence[ServerClient], label: str) -> None:
        """Send to every server; see ``WeightRoute.push``."""
        failure: Exception | None = None
        for server in servers:
            self._source.take(weights)
            try:
                if failure is None:
                    self._send(server, label)
            except (AwayError, TrainingStopped, RuntimeError, OSError) as error:
                failure = error
            for _ in self._source.rest:  # other ranks gather all of it
                pass
        if failure is not None:
            raise TrainingStopped(
                f"the server {server.url} must take the weights by the transfer API: got "
                f"{failure}. Go on from the last checkpoint, with `transfer` false for files."
            ) from failure

    def again(self, server: ServerClient, label: str) -> None:
        """Refuse.

        Raises:
            TrainingStopped: always.
        """
        raise TrainingStopped(
            f"the server {server.url} must keep the weights until the next push: got none, it was "
            "restarted. Go on from the last checkpoint, with `transfer` false for files, which a "
            "restarted server loads again."
        )

    def _send(self, server: ServerClient, label: str) -> None:
        if ranks()[0]:
            self._engine(server).send_weights()
            return
        with paused(server):
            workers = len(server.rpc("name_student", ""))  # until all of it is there
            self._engine(server, workers).send_weights()
        server.rpc("name_student", label)

    def _engine(self, server: ServerClient, workers: int = 0) -> Any:
        if server.url not in self._engines:
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

            self._engines[server.url] = WeightTransferTrainerFactory.trainer_init(
                init_info(self.backend, server, workers + 1, ranks()[0]),
                client=Control(server),
                source=self._source,
            )
        return self._engines[server.url]


def init_info(backend: str, server: ServerClient, world_size: int, rank: int) -> Any:
    """Return where trainer and servers meet, for vLLM's NCCL backend."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(*meeting_point(server), world_size, rank=rank)


def meeting_point(server: ServerClient) -> tuple[str, int]:
    """Return an address of this machine that the server reaches, and a free port."""
    parts = urlsplit(server.url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        towards.connect((parts.hostname or "", parts.port or 80))
        address = str(towards.getsockname()[0])
    with socket.socket() as free:
        free.bind((address, 0))
        return address, int(free.getsockname()[1])


class Meta(NamedTuple):
    """What vLLM wants to know of a tensor before it comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Source:
    """The weights of one push, as vLLM's engines read them: once."""

    def __init__(self) -> None:
        self.rest: Iterator[tuple[str, Tensor]] = iter(())
        self._meta: list[Meta] = []

    def take(self, weights: HubWeights) -> None:
        """Be about these weights from now on."""
        self.rest = weights.tensors()
        self._meta = [Meta(*described) for described in weights.described()]

    def metadata(self) -> list[Meta]:
        """Return names, types and shapes, without gathering anything."""
        return self._meta

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.rest


@dataclass(frozen=True)
class Control:
    """The routes of a server that the sender needs, by the names that vLLM gives them."""

    server: ServerClient

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers meet the sender."""
        self.server.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Get ready for weights."""
        self.server.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Receive them."""
        self.server.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Take them into use."""
        self.server.post("/finish_weight_update", {"weight_version": weight_version})
