"""Sends weights from GPU to GPU, by vLLM's weight-transfer API.

vLLM is imported only when weights are sent this way.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

from kdrl_lightning.engines.http_client import ServerClient
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.engines.weight_transport import WeightRoute, paused, ranks
from kdrl_lightning.errors import TrainingStopped

# `Any`: vLLM is optional, and type checkers skip it.


class TransferRoute(WeightRoute):
    """Sends weights from the first rank to one server after the other, in buffers of 1 GiB.

    The other ranks only help to gather sharded weights. A restarted server cannot get the
    weights again before the next push, so a restart stops the run.

    Args:
        backend: the transfer backend that the servers were started with.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._source = Source()
        self._engines: dict[str, Any] = {}

    def push(self, weights: HubWeights, servers: Sequence[ServerClient], label: str) -> None:
        """Send the weights to every server; see ``WeightRoute.push``."""
        failed: tuple[ServerClient, Exception] | None = None
        for server in servers:
            self._source.take(weights)
            try:
                if failed is None:
                    self._send(server, label)
            except Exception as error:  # the other ranks wait for this one, so raise it at the end
                failed = server, error
            for _ in self._source.rest:  # the other ranks gather all weights
                pass
        if failed is not None:
            refusing, failure = failed
            found = str(failure) or type(failure).__name__
            raise TrainingStopped(
                f"the server {refusing.url} must take the weights through the transfer API: got "
                f"{found}. Resume from the last checkpoint with `transfer: false`, which sends "
                "weights through files."
            ) from failure

    def again(self, server: ServerClient, label: str) -> None:
        """Raise an error, because these weights exist in no file.

        Raises:
            TrainingStopped: always.
        """
        raise TrainingStopped(
            f"the server {server.url} must keep the weights until the next push: got none, because "
            "it was restarted. Resume from the last checkpoint with `transfer: false`: a restarted "
            "server loads files again."
        )

    def _send(self, server: ServerClient, label: str) -> None:
        if ranks()[0]:
            self._engine(server).send_weights()
            return
        with paused(server):
            workers = len(server.rpc("name_student", ""))  # no label until all weights arrived
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
    """Return vLLM's description of the NCCL group of the trainer and a server's workers.

    Args:
        backend: the transfer backend.
        server: the server.
        world_size: number of processes in the group: the sender and the server's workers.
        rank: this process's rank in the training run.
    """
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(*meeting_point(server), world_size, rank=rank)


def meeting_point(server: ServerClient) -> tuple[str, int]:
    """Return the address by which the server can reach this machine, and a free port."""
    parts = urlsplit(server.url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        towards.connect((parts.hostname or "", parts.port or 80))
        address = str(towards.getsockname()[0])
    with socket.socket() as free:
        free.bind((address, 0))
        return address, int(free.getsockname()[1])


class Meta(NamedTuple):
    """Name, dtype and unsharded shape of a tensor, which vLLM reads before the tensor arrives."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Source:
    """Hands the weights of a push to vLLM, which reads them once."""

    def __init__(self) -> None:
        self.rest: Iterator[tuple[str, Tensor]] = iter(())
        self._meta: list[Meta] = []

    def take(self, weights: HubWeights) -> None:
        """Set the weights of the next push."""
        self.rest = weights.tensors()
        self._meta = [Meta(*described) for described in weights.described()]

    def metadata(self) -> list[Meta]:
        """Return names, dtypes and unsharded shapes, without a gather."""
        return self._meta

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.rest


@dataclass(frozen=True)
class Control:
    """HTTP calls to a server, under the names by which vLLM's sender calls them."""

    server: ServerClient

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Make the server's workers connect to the sender."""
        self.server.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Prepare the server for new weights."""
        self.server.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Make the server receive weights."""
        self.server.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Make the server use the weights that it received."""
        self.server.post("/finish_weight_update", {"weight_version": weight_version})
