"""Stopping every process of a run if one has to stop, so that none waits for another forever."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from kdrl_lightning.errors import TrainingStopped

T = TypeVar("T")

ANOTHER_STOPPED = "another process had to stop: its message says why."


def stop_together(work: Callable[[], T], reduce: Callable[[Tensor, str], Tensor]) -> T:
    """Run ``work`` on every rank and return its result; if it raises on one rank, all ranks raise.

    Args:
        work: a function without collectives; it may raise on some ranks only.
        reduce: ``(tensor, "sum") -> tensor``, a reduction over ranks.

    Raises:
        TrainingStopped: ``work`` raised on another rank, not on this one.
        Exception: the error of ``work`` on this rank.
    """
    result: list[T] = []
    reason: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        reason = error
    stopped = reduce(torch.tensor([float(reason is not None)]), "sum")
    if reason is not None:
        raise reason
    if float(stopped):
        raise TrainingStopped(ANOTHER_STOPPED)
    return result[0]


def lost_peer(error: BaseException | None) -> TrainingStopped | None:
    """Return an error for the user if a process of the run has ended under this one, else None.

    A collective then fails on the others, with the backend's words.

    >>> print(lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")))
    another process had to stop: its message says why.
    """
    while error is not None:
        gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
        if gloo or isinstance(error, distributed.DistError):
            return TrainingStopped(ANOTHER_STOPPED)
        error = error.__cause__ or error.__context__
    return None


def first_to_say(message: str) -> bool:
    """Return whether this process is the first of its run to report a message.

    A process that cannot ask the others counts as the first.
    """
    try:
        store = _store()
        key = f"kdrl_lightning/said/{sha256(message.encode(errors='replace')).hexdigest()}"
        return store is None or int(store.add(key, 1)) == 1
    except RuntimeError:  # the process that holds the store has ended
        return True


def _store() -> Any:
    """Return the key-value store that all processes of a run share: the group's, else torchrun's.

    None if there is only one process.
    """
    if distributed.is_initialized():
        alone = distributed.get_world_size() == 1
        return None if alone else distributed.distributed_c10d._get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=10)
    return distributed.TCPStore(host, port, is_master=False, timeout=wait)  # type: ignore[attr-defined]


def require_embedded(ids: Tensor, rows: int) -> None:
    """Refuse ids in a teacher's completions that the student has no embedding for.

    Args:
        ids: token ids, of any shape.
        rows: rows of the student's embedding.

    Raises:
        TrainingStopped: an id is ``rows`` or higher.
    """
    highest = int(ids.max()) if ids.numel() else -1
    if highest >= rows:
        raise TrainingStopped(
            f"token ids of the teacher's completions must be below {rows}, the rows of the "
            f"student's embedding: got {highest}. Choose a teacher with the student's vocabulary."
        )
