"""The strategies ``fsdp2`` and ``fsdp2_full``, and what ends the processes of a failed run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch.distributed.fsdp import FSDPModule

from kdrl_lightning.common.distributed import has_spoken
from kdrl_lightning.errors import ConfigurationError, Interrupted
from kdrl_lightning.models.shard_loading import load_moments
from kdrl_lightning.models.sharding import Sharding
from kdrl_lightning.trainer.internals import (
    finds_unused_parameters,
    handles_failure,
    load_weights,
    on_child_failure,
    set_data_parallel_size,
)
from kdrl_lightning.trainer.stop_signals import NAMES as SIGNALS

GRACE_S = 5.0
WAITS_S = 15.0  # for processes to end by themselves
SAVES_S = 60.0  # for this process to save its student after an error
# Exit codes of a process that a signal ends before it can handle signals and print a message.
EARLY = {-number: 128 + number for number in SIGNALS}
NAMES = {128 + number: name for number, name in SIGNALS.items()}
REFUSED = ("fsdp", "fsdp_cpu_offload")


class FSDP2Strategy(ModelParallelStrategy):
    """Shards student, teacher and reference over all processes of all nodes (FSDP2).

    With ``--trainer.strategy fsdp2`` each rank writes its shards to a checkpoint folder; with
    ``fsdp2_full`` rank 0 gathers all shards and writes one file.

    Args:
        save_distributed_checkpoint: write a folder of shards; if false, one file.
        process_group_backend: backend of torch.distributed; None: the device's default.
        timeout: time limit of a collective.
        reduce_each_micro_batch: reduce gradients after every micro-batch. By default they are
            reduced once per optimizer step, and each rank holds whole gradients (4 bytes per
            trained parameter) between the micro-batches of a step.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        reduce_each_micro_batch: bool = False,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.reduce_each_micro_batch = reduce_each_micro_batch

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Skip the reduction of gradients, in all micro-batches of a step but the last.

        Lightning's method supports only DDP.
        """
        assert self.model is not None
        sharded = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        if self.reduce_each_micro_batch:
            sharded = []
        for module in sharded:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True, recurse=False)

    def setup_environment(self) -> None:
        """Make every process data-parallel; Lightning's "auto" would count one per node."""
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:  # as in Lightning
        """Load the weights as Lightning does, and the moments of parameters that have them."""
        path = Path(self.broadcast(checkpoint_path))
        rest = load_weights(path, self, weights_only)
        assert self.model is not None
        for index, optimizer in enumerate(self.optimizers):
            source = path if path.is_dir() else rest["optimizer_states"][index]
            load_moments(self.model, optimizer, source, f"optimizer_{index}")
        return rest


def register() -> None:
    """Register the names for ``Trainer(strategy=...)``."""
    for name, parts in (("fsdp2", True), ("fsdp2_full", False)):
        StrategyRegistry.register(
            name,
            FSDP2Strategy,
            description=f"FSDP2, {'sharded' if parts else 'full'} checkpoints",
            override=True,
            save_distributed_checkpoint=parts,
        )


def end_with_children() -> None:
    """Make the launching process exit with the exit code of a child process that failed.

    Lightning would kill the launching process with SIGKILL, because it may be waiting in C++ code,
    where Python handles no signal, e.g. at the start of a process group. Then Ctrl-C would not exit
    with 130.
    """

    def end(children: Sequence[Popen[bytes]], kill_all: Callable[[], None]) -> None:
        raw = [child.returncode or 0 for child in children]
        code = max(EARLY.get(value, value) for value in raw)
        if code <= 0:  # something killed a process
            kill_all()
            return
        time.sleep(GRACE_S)  # runs in a thread; processes that can end by themselves do so now
        if handles_failure():
            time.sleep(SAVES_S)  # it saves the student, then reports its error
        for child in children:
            child.kill()
        if code not in raw:
            os.write(2, f"error: stopped by {NAMES[code]}: nothing was saved.\n".encode())
        elif code in NAMES and not has_spoken():  # it ended before its message was complete
            cure = "`--ckpt_path last` continues from the newest checkpoint, if there is one"
            os.write(2, f"error: stopped by {NAMES[code]}: {cure}.\n".encode())
        os._exit(code)

    on_child_failure(end)


def end_children(strategy: Strategy, error: BaseException) -> None:
    """End the processes that Lightning's launcher started, after an error in this one.

    If only this process fails, the others wait for it in a collective: with NCCL for half an hour,
    even after this process has ended. If all fail, they end by themselves.

    Args:
        strategy: the run's strategy.
        error: the error that ends the run; after a signal all processes end by themselves.
    """
    children: list[Popen[bytes]] = getattr(strategy.launcher, "procs", [])
    if not isinstance(error, Exception) or isinstance(error, Interrupted):
        return
    # Lightning watches this list, and would kill this process before it reports its error.
    waiting = list(children)
    children.clear()
    deadline = time.monotonic() + WAITS_S
    for child in waiting:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except TimeoutExpired:
            child.kill()


def refuse_fsdp1(strategy: object) -> None:
    """Refuse FSDP1, whether it comes as a flag, a configured class or an object.

    Raises:
        ConfigurationError: the strategy is FSDP1.
    """
    named = getattr(strategy, "class_path", strategy)
    if isinstance(strategy, FSDPStrategy):
        named = "FSDPStrategy"
    if named in REFUSED or str(named).split(".")[-1] == "FSDPStrategy":
        raise ConfigurationError(
            f"`strategy` must be fsdp2 for sharding: got {named}, which is FSDP1: it cannot clip "
            "by norm, refuses the CPU, and flattens the weights that engines and export read by "
            "name. Use `--trainer.strategy fsdp2`."
        )


def check_unreached(strategy: Strategy, unreached: list[str]) -> None:
    """Refuse DDP, which waits for a gradient of every parameter, if some may get none.

    Raises:
        ConfigurationError: the strategy is DDP and does not look for unused parameters.
    """
    waits = isinstance(strategy, DDPStrategy) and not finds_unused_parameters(strategy)
    if waits and unreached:
        raise ConfigurationError(
            "`strategy` must look for unused parameters if a model has some: got ddp, and "
            f"{unreached[0]} and {len(unreached) - 1} more get no gradient. Use "
            "`--trainer.strategy ddp_find_unused_parameters_true`."
        )


def sharding_of(trainer: pl.Trainer | None) -> Sharding | None:
    """Return how the trainer's strategy shards models; None if every rank holds whole models.

    Raises:
        ConfigurationError: FSDP1, tensor parallelism, or evaluation in inference mode.
    """
    if trainer is None:
        return None
    strategy = trainer.strategy
    refuse_fsdp1(strategy)
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    tensor_parallel = strategy.device_mesh["tensor_parallel"].size()
    if tensor_parallel != 1:
        raise ConfigurationError(
            f"`tensor_parallel_size` must be 1: got {tensor_parallel}. "
            "Use `--trainer.strategy fsdp2`, which shards over all processes."
        )
    if trainer.validate_loop.inference_mode:
        # A sharded model that first runs in inference mode cannot be trained afterwards.
        raise ConfigurationError(
            "`inference_mode` must be false under fsdp2: got true. Set `inference_mode: false`."
        )
    mixed = trainer.precision == "bf16-mixed"
    return Sharding(strategy.device_mesh["data_parallel"], torch.bfloat16 if mixed else None)


register()
