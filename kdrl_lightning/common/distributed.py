"""Stop every process of a run if one has to stop, so that none waits for another forever."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from kdrl_lightning.errors import TrainingStopped

# `Any`: torch's store has no public type.

T = TypeVar("T")
SAID = "kdrl_lightning/said"
ANSWER_S = 2.0
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


def agree(failure: Exception | None) -> None:
    """Raise on every rank if work failed on one of them; all ranks must call it.

    Unlike ``stop_together`` it needs no trainer, every rank gets the reason, and the work may
    contain collectives, provided that a failing rank still takes part in all of them.

    Args:
        failure: what this rank's work raised; None if it succeeded.

    Raises:
        TrainingStopped: work failed on another rank only.
        Exception: the error of this rank.
    """
    reasons: list[str | None] = [None]
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        reasons *= distributed.get_world_size()
        here = None if failure is None else str(failure) or type(failure).__name__
        distributed.all_gather_object(reasons, here)
    if failure is not None:
        raise failure
    reason = next((r for r in reasons if r is not None), None)
    if reason is not None:
        raise TrainingStopped(reason)


def agreed(work: Callable[[], T]) -> T:
    """Return the result of ``work``; if it raises on one rank, all ranks raise, with its reason.

    Args:
        work: a function without collectives.
    """
    result: list[T] = []
    failure: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        failure = error
    agree(failure)
    return result[0]


def lost_peer(error: BaseException | None) -> TrainingStopped | None:
    """Return an error for the user if ``error`` shows that another process ended, else None.

    If a process ends, a collective fails on the others, with the backend's message.

    >>> print(lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")))
    another process had to stop: its message says why.
    """
    while error is not None:
        gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
        if gloo or isinstance(error, distributed.DistError):
            return TrainingStopped(ANOTHER_STOPPED)
        error = error.__cause__ or error.__context__
    return None


def first_to_say(message: str, waits_s: float = 0.0) -> bool:
    """Return whether this process is the first of its run to report a message.

    A process that cannot reach the others counts as the first. SLURM tasks without a process group
    reach only those on the same node.

    Args:
        message: what it would report.
        waits_s: seconds that a process other than a node's first waits; False if any process
            reports something meanwhile. After Ctrl-C Lightning's first process kills the others,
            so one of them could be killed between this answer and its report.
    """
    digest = sha256(message.encode(errors="replace")).hexdigest()
    try:
        store = _store()
        if store is None:
            return _first_of_job(digest)
        end = time.monotonic() + waits_s * (int(os.environ.get("LOCAL_RANK") or 0) > 0)
        while time.monotonic() < end:
            if int(store.add(SAID, 0)):
                return False
            time.sleep(0.05)
        first = int(store.add(f"{SAID}/{digest}", 1)) == 1
        if first:
            store.add(SAID, 1)
        return first
    except RuntimeError:  # the process that holds the store has ended
        return True


def has_spoken() -> bool:
    """Return whether a process of this group has reported a message; False if nobody answers.

    True without a group: each process then reports its own messages.
    """
    answer: list[int] = []

    def ask() -> None:
        store = _store()
        answer.append(1 if store is None else int(store.add(SAID, 0)))

    thread = threading.Thread(target=ask, daemon=True)  # the main thread may hold the store's lock
    thread.start()
    thread.join(ANSWER_S)
    return bool(answer and answer[0])


def _first_of_job(digest: str) -> bool:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or int(os.environ.get("SLURM_NTASKS") or 1) == 1:
        return True
    step = f"{job}-{os.environ.get('SLURM_STEP_ID')}-{os.environ.get('SLURM_RESTART_COUNT')}"
    file = Path(tempfile.gettempdir(), f"kdrl_lightning-{os.getuid()}-{step}-{digest[:16]}")
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
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
