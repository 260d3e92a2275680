"""One rank fails alone while weights are pushed, servers are asked or a teacher scores.

Both ranks run every case and write how it ended: ``python driver.py FOLDER RANK``. Cases that end
a rank's process run in forks of both, so that nothing is imported again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, distributed

from helpers.with_vllm.models import make_model
from kdrl_lightning.common.distributed import lost_peer
from kdrl_lightning.engines import VLLMEngine, VLLMServerEngine
from kdrl_lightning.engines.vllm import engine as starting
from kdrl_lightning.engines.vllm import hub_names, nccl_transport
from kdrl_lightning.engines.vllm.nccl_transport import TransferRoute
from kdrl_lightning.engines.weight_transport import FileRoute
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout.rollouts import RolloutSource

FOLDER, RANK = Path(), 0  # given on the command line
URL = "http://127.0.0.1:9"


def gathered(self: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield weights with a collective for each, as a sharded student's are read."""
    for name, parameter in self._model.named_parameters():
        distributed.all_reduce(torch.ones(1))
        yield name, parameter.detach()


def fails_on(rank: int, error: Exception, work: Callable[..., Any]) -> Callable[..., Any]:
    def failing(*args: Any, **named: Any) -> Any:
        if rank == RANK:
            raise error
        return work(*args, **named)

    return failing


def server_engine(route: Any) -> Any:
    engine = VLLMServerEngine([URL], max_away_s=0.0)
    engine._route = route
    return engine


def by_files(error: Exception) -> Callable[[], None]:
    def push() -> None:
        from kdrl_lightning.engines import weight_transport

        write, first = weight_transport.write_shards, True

        def half(tensors: Any, folder: Any) -> None:
            nonlocal first
            next(tensors)
            if RANK == 0:
                raise error
            write(tensors, folder)

        weight_transport.write_shards = half
        server_engine(FileRoute(None)).update_weights(WEIGHTS, 1)

    return push


def by_transfer(error: Exception) -> Callable[[], None]:
    def push() -> None:
        def send(self: Any, server: Any, label: str) -> None:
            if RANK == 0:
                next(self._source.rest)
                raise error
            for _ in self._source.rest:
                pass

        nccl_transport.TransferRoute._send = send  # type: ignore[method-assign]
        server_engine(TransferRoute("nccl")).update_weights(WEIGHTS, 1)

    return push


def chosen_on_one_rank() -> None:
    engine = server_engine(None)
    engine._route_of = fails_on(1, RuntimeError("no backend here"), lambda _: FileRoute(None))
    engine.update_weights(WEIGHTS, 1)


def in_process() -> None:
    engine = VLLMEngine.__new__(VLLMEngine)
    engine.sleep, engine._model, engine._path, engine._sampled = False, None, "a student", True
    core = SimpleNamespace(
        collective_rpc=fails_on(0, ValueError("unknown weight"), consume),
        reset_prefix_cache=lambda: True,
    )
    engine._llm = core
    engine.update_weights(WEIGHTS, 1)


def consume(method: str, kwargs: Any) -> None:
    for _ in kwargs["weights_iterator"]:
        pass


def setup_on_one_rank() -> None:
    engine = VLLMServerEngine([URL], max_away_s=0.0)
    answer = {"architecture": "Qwen2ForCausalLM", "vocab_size": str(VOCAB)}
    answer |= {"logprobs_mode": "processed_logprobs", "max_model_len": "64", "dtype": "float32"}
    answer |= {"transfer": "", "implementation": ""}
    if RANK == 0:  # the other rank finds no process at the address
        engine._servers[0].rpc = lambda method: [answer]  # type: ignore[method-assign]
    engine.setup(WEIGHTS, 1, 0)


def teacher_on_one_rank() -> None:
    source = RolloutSource.__new__(RolloutSource)

    def reduce(value: Tensor, operation: str) -> Tensor:
        distributed.all_reduce(value)
        return value

    frozen = SimpleNamespace(collective=False)
    module = SimpleNamespace(frozen=frozen, reduce=reduce)
    source.live = cast(Any, SimpleNamespace(module=module))
    source._guard(fails_on(1, OSError("the teacher's server is away"), lambda: cast(Any, None)))


def killed_in_a_gather() -> None:
    for number, _ in enumerate(gathered(WEIGHTS_READER)):
        if RANK == 1 and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def does_not_start() -> None:
    """Fail to start vLLM on one rank, whose process then ends, while the other rank continues."""
    vllm = ModuleType("vllm")
    vllm.__spec__ = ModuleSpec("vllm", None)
    core = SimpleNamespace(
        apply_model=lambda _: [None], collective_rpc=consume, reset_prefix_cache=lambda: True
    )
    vllm.LLM = fails_on(1, ValueError("no memory for a cache"), lambda **_: core)  # type: ignore[attr-defined]
    sys.modules["vllm"] = vllm
    starting.classes_kept = lambda: nullcontext(lambda _: None)  # type: ignore[attr-defined]
    engine = VLLMEngine(max_model_len=16)
    engine.setup(WEIGHTS, 1, 0)
    engine.update_weights(WEIGHTS, 1)


LAST: dict[str, Callable[[], None]] = {
    "killed": killed_in_a_gather,
    "start": does_not_start,
}
CASES: dict[str, Callable[[], None]] = {
    "disk full": by_files(OSError(28, "No space left on device")),
    "value in files": by_files(ValueError("a strange tensor")),
    "transfer value": by_transfer(ValueError("a wrong shape")),
    "transfer import": by_transfer(ImportError("no weight transfer in this vLLM")),
    "route": chosen_on_one_rank,
    "in process": in_process,
    "setup": setup_on_one_rank,
    "teacher": teacher_on_one_rank,
}


def join(name: str) -> None:
    store = distributed.FileStore(str(FOLDER / name), 2)
    distributed.init_process_group("gloo", store=store, rank=RANK, world_size=2)


def forked(case: str, run: Callable[[], None]) -> list[Any]:
    """Run a case in a separate process; return its seconds and words, "" if it was killed."""
    started, file = time.monotonic(), FOLDER / f"{RANK} {case}"
    process = os.fork()
    if process == 0:
        try:
            join(f"store {case}")
            run()
            words = "no error"
        except Exception as error:  # as the program reports it
            lost = lost_peer(error)
            words = f"{type(error).__name__}: {error}" if lost is None else str(lost)
        file.write_text(words)
        os._exit(0)
    os.waitpid(process, 0)
    words = file.read_text() if file.exists() else ""
    return [time.monotonic() - started, words]


if __name__ == "__main__":
    FOLDER, RANK = Path(sys.argv[1]), int(sys.argv[2])
    MODEL = make_model("qwen2", 0)
    VOCAB = MODEL.config.vocab_size
    WEIGHTS = ModelWeights(MODEL, "student")
    WEIGHTS_READER = SimpleNamespace(_model=MODEL)
    hub_names.HubWeights.tensors = gathered  # type: ignore[method-assign]
    ended = {case: forked(case, run) for case, run in LAST.items()}
    join("store")
    for case, run in CASES.items():
        started = time.monotonic()
        try:
            run()
            words = "no error"
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
        ended[case] = [time.monotonic() - started, words]
        (FOLDER / f"{RANK}.json").write_text(json.dumps(ended))
