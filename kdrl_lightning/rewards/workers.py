"""Processes that call a function with a time limit: what hangs is killed and replaced.

Written by hand because ``multiprocessing`` and ``concurrent.futures`` cannot end one call of many,
and import the user's main module again in each process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from kdrl_lightning.errors import require_between
from kdrl_lightning.rewards.callables import portable_target

START_SECONDS = 120.0  # imports, on a busy machine


class WorkerPool:
    """Calls a function of one argument in several processes.

    Processes start at the first call, end with ``close`` or with this process, and do not travel
    when the pool is pickled. Calls that hang cost about ``hanging / workers * seconds``, and the
    cores that they keep busy. A process has 2 GiB for its data.

    Args:
        function: one that another process can have: at the top level of a module, or a partial, a
            bound method or an object that can be pickled (with the state that it has now).
        seconds: time limit of a call.
        workers: processes.
        first: arguments of calls that are made once, before any other, without a time limit: what
            they import and cache, all processes share.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        seconds: float,
        workers: int,
        first: Sequence[Any] = (),
    ) -> None:
        require_between("time_limit_s", seconds, 1e-3, 1e6)
        require_between("workers", workers, 1, 1024)
        self.target = portable_target(function)
        self.first = list(first)
        self.seconds = seconds
        self.count = workers
        self._workers: list[_Worker] = []

    def map(self, arguments: Sequence[Any]) -> list[Any]:
        """Call the function for each argument.

        Returns:
            In the order of the arguments: results, and the exceptions of calls that failed
            (``TimeoutError`` for one that hung).

        Raises:
            Exception: the function cannot be imported by the processes, or fails at ``first``.
        """
        results: list[Any] = [None] * len(arguments)
        waiting = deque(range(len(arguments)))
        if not self._workers:
            weakref.finalize(self, _end, self._workers)
        try:
            while len(self._workers) < min(self.count, len(arguments)):
                self._workers.append(_Worker((*self.target, self.first), self.seconds))
            while waiting or any(worker.call is not None for worker in self._workers):
                for worker in self._workers:
                    if waiting and worker.ready:
                        call = waiting.popleft()
                        results[call] = worker.send(call, arguments[call])
                self._collect(results)
        except BaseException:  # what is on its way would be taken for later answers
            self.close()
            raise
        return results

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        _end(self._workers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_workers": []}

    def _collect(self, results: list[Any]) -> None:
        """Take what has come in; kill what is late."""
        until = min(worker.deadline for worker in self._workers)
        if until == inf:  # nothing is on its way: no call could be handed over
            return
        timeout = max(until - time.monotonic(), 0.0)
        arrived = wait([worker.pipe for worker in self._workers], timeout)
        for worker in self._workers:
            if worker.pipe in arrived:
                worker.receive(results)
            elif time.monotonic() >= worker.deadline:
                worker.expire(results)


class _Worker:
    """A process, and what it does: starts, is ready, or works on a call, until a deadline."""

    def __init__(self, target: tuple[Any, ...], seconds: float) -> None:
        self.seconds = seconds
        self.child: int | None = None
        self.call: int | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS
        self.pipe, theirs = Pipe()
        code = f"from kdrl_lightning.rewards.worker import main; main({theirs.fileno()})"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # An interrupt from the keyboard is ours to handle; and its group can be killed.
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                },
            )
        self.pipe.send((sys.path, *target, seconds))

    def send(self, call: int, argument: Any) -> Exception | None:
        """Hand it a call; return why it cannot be handed over."""
        try:
            self.pipe.send(argument)
        except Exception as error:
            return error
        self.ready, self.call, self.deadline = False, call, time.monotonic() + self.seconds
        return None

    def receive(self, results: list[Any]) -> None:
        """Take one message."""
        try:
            kind, *content = self.pipe.recv()
        except (EOFError, OSError) as lost:
            raise RuntimeError("a worker process of the reward has ended") from lost
        if kind == "failed":
            raise content[0]
        if kind == "ready":
            if self.call is not None:  # its predecessor died of the call
                results[self.call] = RuntimeError("the process that judged it has died")
            self.child = content[0]
        elif self.call is None:  # an answer that crossed the kill
            return
        else:
            result, error = content
            results[self.call] = result if error is None else error
        self.call, self.ready, self.deadline = None, True, inf

    def expire(self, results: list[Any]) -> None:
        """Kill what hangs; the worker ends what it started, and its successor reports by itself."""
        if self.call is None or self.child is None:
            raise TimeoutError(f"a worker process did not start in {START_SECONDS:g} s")
        os.kill(self.child, signal.SIGKILL)
        results[self.call] = TimeoutError(f"no verdict in {self.seconds:g} s")
        self.call, self.deadline = None, time.monotonic() + START_SECONDS


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()  # a child that waits ends, and its parent with it
        if worker.child is None:
            _kill(worker.process)
        elif worker.call is not None:
            with suppress(ProcessLookupError):
                os.kill(worker.child, signal.SIGKILL)
    for worker in workers:
        try:
            worker.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            _kill(worker.process)
            worker.process.wait()
    workers.clear()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker that does not end by itself, with what it has started while it imported."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
