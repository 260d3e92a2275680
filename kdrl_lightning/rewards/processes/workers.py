"""A pool of processes that call a function with a time limit; hanging processes are replaced.

It is written by hand because ``multiprocessing`` and ``concurrent.futures`` cannot stop one call of
many, and import the user's main module again in each process.
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

from kdrl_lightning.errors import TrainingStopped, require_between, require_count
from kdrl_lightning.rewards.callables import describe, portable_target

# `Any`: arguments and results of users' functions.

START_SECONDS = 120.0  # enough for the imports on a busy machine
STARTS = 3  # the pool gives up after this many processes that ended before they were ready
DIED = "the process that judged it has died"


class WorkerPool:
    """Calls a function of one argument in several processes, with a time limit per call.

    A process that dies, e.g. because it has no memory left, is replaced, and its call is made once
    more. The processes start at the first call and end with ``close`` or with this process. A
    pickled pool has no processes. ``n`` hanging calls take about ``n / workers * seconds``, and
    may keep cores busy. Each process may use 2 GiB for its data.

    Args:
        function: a function at the top level of a module, or a partial, a bound method or an object
            that can be pickled (with its state at this moment).
        seconds: time limit of a call.
        workers: number of processes.
        first: arguments of calls that are made once, before all others and without a time limit;
            all processes share what these calls import and cache.

    Raises:
        ConfigurationError: a value is out of range, or another process cannot load the function.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        seconds: float,
        workers: int,
        first: Sequence[Any] = (),
    ) -> None:
        require_between("time_limit_s", seconds, 1e-3, 1e6)
        require_count("workers", workers, 1, 1024)
        self.target = portable_target(function)
        self.name = describe(function)
        self.first = list(first)
        self.seconds = seconds
        self.count = workers
        self._workers: list[_Worker] = []

    def map(self, arguments: Sequence[Any]) -> list[Any]:
        """Call the function for each argument.

        Returns:
            One result per argument, in their order; for a call that failed, its exception
            (``TimeoutError`` if it hung).

        Raises:
            Exception: the processes cannot import the function, or it fails on ``first``.
            TimeoutError: a process is not ready in time.
            TrainingStopped: the processes end before they are ready.
        """
        calls = _Calls(arguments)
        self._failed_starts = 0
        if not self._workers:
            weakref.finalize(self, _end, self._workers)
        try:
            while len(self._workers) < min(self.count, len(arguments)):
                self._workers.append(self._start())
            while calls.waiting or any(worker.call is not None for worker in self._workers):
                for place, worker in enumerate(self._workers):
                    if calls.waiting and worker.ready and not worker.send(calls):
                        self._replace(place, calls)
                self._collect(calls)
        except BaseException:  # a later `map` would mistake late replies for replies to its calls
            self.close()
            raise
        return calls.results

    def close(self) -> None:
        """Stop the processes; the next call starts new ones."""
        _end(self._workers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_workers": []}

    def _start(self) -> _Worker:
        return _Worker((*self.target, self.first), self.seconds)

    def _collect(self, calls: _Calls) -> None:
        """Receive results, kill calls past their deadline, and replace processes that ended."""
        until = min(worker.deadline for worker in self._workers)
        if until == inf:  # no call is running, because none could be sent
            return
        timeout = max(until - time.monotonic(), 0.0)
        arrived = wait([worker.pipe for worker in self._workers], timeout)
        for place, worker in enumerate(self._workers):
            if worker.pipe in arrived:
                if not worker.receive(calls):
                    self._replace(place, calls)
            elif time.monotonic() >= worker.deadline:
                worker.expire(calls.results)

    def _replace(self, place: int, calls: _Calls) -> None:
        """Replace a process that has ended by a new one."""
        ended = self._workers[place]
        self._failed_starts += ended.child is None
        if self._failed_starts == STARTS:
            module, name = self.target
            called = f"{module}.{name}" if module else self.name
            raise TrainingStopped(
                f"the worker processes of {called} must start: got {STARTS} that ended before they "
                "were ready. Check that its module can be imported, and the machine's memory."
            )
        calls.again(ended.call)
        _end([ended])
        self._workers[place] = self._start()


class _Calls:
    """The calls of one ``map``: those that wait for a process, and the results of the others."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        self.arguments = arguments
        self.results: list[Any] = [None] * len(arguments)
        self.waiting = deque(range(len(arguments)))
        self._died: set[int] = set()

    def again(self, call: int | None) -> None:
        """Repeat a call whose process died; if a second process dies, too, the call fails."""
        if call is None:
            return
        if call in self._died:
            self.results[call] = RuntimeError(DIED)
        else:
            self._died.add(call)
            self.waiting.appendleft(call)


class _Worker:
    """A worker process and its state: starting, ready, or working on a call until a deadline."""

    def __init__(self, target: tuple[Any, ...], seconds: float) -> None:
        self.seconds = seconds
        self.child: int | None = None
        self.call: int | None = None
        self.ready = False
        self.ticket = 0  # number of the latest call: after a kill, an older reply may still arrive
        self.deadline = time.monotonic() + START_SECONDS
        self.pipe, far_end = Pipe()
        code = f"from kdrl_lightning.rewards.processes.worker import main; main({far_end.fileno()})"
        with far_end:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[far_end.fileno()],
                # Only this process gets keyboard interrupts, and the group can be killed at once.
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                },
            )
        self.pipe.send((sys.path, *target, seconds))

    def send(self, calls: _Calls) -> bool:
        """Send the next call; return whether the process still runs."""
        call = calls.waiting.popleft()
        self.ticket += 1
        try:
            while self.pipe.poll():  # its child died and was replaced while it was idle
                if not self.receive(calls):
                    raise EOFError
            self.pipe.send((self.ticket, calls.arguments[call]))
        except (EOFError, OSError):
            calls.waiting.appendleft(call)
            return False
        except Exception as error:  # the argument cannot be pickled
            calls.results[call] = error
            return True
        self.ready, self.call, self.deadline = False, call, time.monotonic() + self.seconds
        return True

    def receive(self, calls: _Calls) -> bool:
        """Receive one message; return whether the process still runs."""
        try:
            kind, *content = self.pipe.recv()
        except (EOFError, OSError):
            return False
        if kind == "failed":
            raise content[0]
        if kind == "ready":
            calls.again(self.call)  # the call, if any, during which the previous child died
            self.child = content[0]
        else:
            ticket, result, error = content
            if self.call is None or ticket != self.ticket:  # a reply sent just before a kill
                return True
            calls.results[self.call] = result if error is None else error
        self.call, self.ready, self.deadline = None, True, inf
        return True

    def expire(self, results: list[Any]) -> None:
        """Kill a child that hangs; the worker cleans up after it and starts the next one.

        Raises:
            TimeoutError: the process did not get ready in time.
        """
        if self.call is None or self.child is None:
            raise TimeoutError(f"a worker process did not start in {START_SECONDS:g} s")
        os.kill(self.child, signal.SIGKILL)
        results[self.call] = TimeoutError(f"no verdict in {self.seconds:g} s")
        self.call, self.deadline = None, time.monotonic() + START_SECONDS


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()  # a waiting child then ends, and its parent too
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
    """Kill a worker that does not end by itself, and the processes that its imports started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
