"""Runs vLLM inside the training process: one engine at a time, whose side effects we undo.

vLLM expects a separate process: when it starts, it sets seeds, threads, the matmul precision and
the current GPU; when it stops, it destroys the process group.
"""

from __future__ import annotations

import gc
import os
import random
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch

# `Any`: vLLM is optional, and type checkers skip it.

# Environment variables that vLLM reads: no usage statistics, and a log of errors only. We keep
# values that the user has set.
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
# We pass weights to vLLM as tensors, so it must run in this process, whatever the shell has set.
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
MEETING = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


class RunningEngine:
    """The one running vLLM of this process; the next one closes it.

    It also closes when its owner is garbage-collected. vLLM's state is global: with ``sleep`` a
    second one fails, and on a GPU each one would reserve memory.

    Args:
        llm: the ``vllm.LLM``.
        owner: the ``VLLMEngine`` that samples with it.
        closed: called with the owner when vLLM stops.
        owns_group: whether vLLM made torch's process group, and may destroy it.
    """

    current: ClassVar[RunningEngine | None] = None

    def __init__(
        self, llm: Any, owner: Any, closed: Callable[[Any], None], owns_group: bool
    ) -> None:
        self._llm = llm
        self._owner = weakref.ref(owner)
        self._closed = closed
        self._owns_group = owns_group
        RunningEngine.current = self
        weakref.finalize(owner, self.close)

    def close(self) -> None:
        """Stop vLLM and free its memory; keep the trainer's process group. May be called twice."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        if RunningEngine.current is self:
            RunningEngine.current = None
        owner = self._owner()
        if owner is not None:
            self._closed(owner)
        with _group_kept(self._owns_group):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def close_running() -> None:
    """Close the engine of this process, if there is one."""
    if RunningEngine.current is not None:
        RunningEngine.current.close()


@contextmanager
def _group_kept(owned: bool) -> Iterator[None]:
    """Keep torch's process group while vLLM shuts down, unless vLLM made it."""
    destroy = torch.distributed.destroy_process_group

    def spared(group: Any = None) -> None:
        # While Python exits, the group may have ended before the engine.
        if torch.distributed.is_initialized() and (group is not None or owned):
            destroy(group)

    torch.distributed.destroy_process_group = spared
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


@contextmanager
def undisturbed(device: torch.device) -> Iterator[str | None]:
    """Prepare this process for the start of vLLM on this rank's device, and restore it afterwards.

    On exit we restore random states, threads, the matmul precision, the current GPU and the
    launcher's variables.

    Args:
        device: the device of the student's weights on this rank.

    Yields:
        vLLM's executor backend: on a GPU or with several ranks ``external_launcher``, which reads
        the GPU's index from an environment variable; else None.
    """
    grouped = torch.distributed.is_initialized()
    several = grouped and torch.distributed.get_world_size() > 1
    external = several or device.type == "cuda"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[IN_PROCESS] = "0"
    threads, precision = torch.set_num_threads, _matmul_precision()
    states = random.getstate(), np.random.get_state()
    gpus = [device.index or 0] if device.type == "cuda" else []
    with _launcher_variables(device, grouped) if external else _hidden(LAUNCHER):
        try:
            with (
                torch.random.fork_rng(devices=gpus),
                torch.cuda.device(gpus[0]) if gpus else nullcontext(),
            ):
                yield "external_launcher" if external else None
        finally:
            torch.set_num_threads = threads  # vLLM's CPU worker replaces it
            precision()
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _launcher_variables(device: torch.device, grouped: bool) -> Iterator[None]:
    """Set the variables of ``torchrun`` inside the context, from this rank's device.

    SLURM sets no ``LOCAL_RANK``, and with ``devices: [3]`` no variable names the device.

    Args:
        device: the rank's device.
        grouped: whether vLLM joins the trainer's process group; else it makes one of this process
            alone.
    """
    rank = torch.distributed.get_rank() if grouped else 0
    local = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK") or 0)
    set_here = {"RANK": str(rank), "LOCAL_RANK": str(local)}
    if not grouped:
        set_here |= {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    with _hidden(LAUNCHER if grouped else (*LAUNCHER, *MEETING)):
        os.environ.update(set_here)
        try:
            yield
        finally:
            for name in set_here:
                os.environ.pop(name, None)


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Remove environment variables inside the context."""
    before = {name: os.environ.pop(name, None) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _matmul_precision() -> Callable[[], None]:
    """Return a function that restores the current precision of float32 matrix products."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by torch's newer API, which the older one cannot read
        kinds: Any = torch.backends  # its type hints lack the newer API
        cuda, cpu = kinds.cuda.matmul, kinds.mkldnn.matmul
        before = cuda.fp32_precision, cpu.fp32_precision

        def restore() -> None:
            cuda.fp32_precision, cpu.fp32_precision = before

        return restore
    return lambda: torch.set_float32_matmul_precision(legacy)
