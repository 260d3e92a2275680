"""A weight-transfer backend for CPUs, besides vLLM's NCCL: tensors as bytes in a TCPStore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.distributed import TCPStore
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from kdrl_lightning.engines.vllm.worker import StudentWorker


@dataclass
class Trainer(TrainerInitInfo):
    backend: ClassVar[str] = "store"
    address: str
    port: int


@dataclass
class Init(WeightTransferInitInfo):
    address: str
    port: int


@dataclass
class Update(WeightTransferUpdateInfo):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class Receiver(WeightTransferEngine[Init, Update]):
    init_info_cls, update_info_cls = Init, Update

    def init_transfer_engine(self, init_info: Init) -> None:
        self.store = TCPStore(init_info.address, init_info.port, is_master=False)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # no device to wait for

    def receive_weights(self, update_info: Update) -> None:
        known = (update_info.names, update_info.dtypes, update_info.shapes)
        for name, dtype, shape in zip(*known, strict=True):
            raw = torch.frombuffer(bytearray(self.store.get(name)), dtype=getattr(torch, dtype))
            self.model.load_weights([(name, raw.view(shape))])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to close."""


class Sender(TrainerWeightTransferEngine[Trainer]):
    init_info_cls = Trainer

    @classmethod
    def trainer_init(cls, init_info: Trainer, *, client: Any, source: Any = None) -> Sender:
        made = cls(client=client, source=source, is_sender=init_info.is_sender)
        where = (init_info.address, init_info.port)
        made.store = TCPStore(*where, is_master=True, wait_for_workers=False)
        client.init_weight_transfer_engine({"address": where[0], "port": where[1]})
        return made

    def send_weights(self) -> None:
        meta = self.source.metadata()
        self.client.start_weight_update()
        sent = [name for name, tensor in self.source if self._put(name, tensor)]
        assert sent == [m.name for m in meta]
        dtypes = [str(m.dtype).removeprefix("torch.") for m in meta]
        shapes = [list(m.shape) for m in meta]
        self.client.update_weights({"names": sent, "dtypes": dtypes, "shapes": shapes})
        self.client.finish_weight_update()

    def _put(self, name: str, tensor: torch.Tensor) -> bool:
        self.store.set(name, tensor.contiguous().numpy().tobytes())
        return True


class Worker(StudentWorker):
    """Named on the server's command line, so that it knows the backend."""


WeightTransferEngineFactory.register_engine("store", Receiver)
WeightTransferTrainerFactory.register_engine("store", Sender)
