"""The worker process of ``WorkerPool``: imports a function once and forks children that call it.

The process gets the number of an open pipe. It is a new interpreter with a single thread, so that
forking is safe. A child that was killed is replaced in milliseconds, without another import. When a
child ends, the worker adopts the processes that the child has started, and kills them. If the
training process has ended, the worker kills all of them and ends.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

# `Any`: arguments and results of users' functions.

MEMORY_BYTES = 2 << 30
CLOSED = 113  # exit status of a child whose pipe was closed
# Options of prctl(2): send this process a signal when its parent ends; adopt orphaned descendants.
PDEATHSIG, SUBREAPER = 1, 36
# Time between checks that the training process still runs: a fork of it may keep the pipe open.
LOOK_SECONDS = 0.5


def main(descriptor: int) -> None:
    """Serve calls until the pipe is closed.

    The first message names the function, arguments to try it on, and the time limit in seconds;
    each later message is ``(ticket, argument)``. Replies are ``("ready", process)`` from each new
    child, ``("done", ticket, result, error)`` for each call, and ``("failed", error)`` if the
    function cannot be imported or fails on the first arguments.

    Args:
        descriptor: file descriptor of the pipe.
    """
    pipe, trainer = Connection(descriptor), os.getppid()
    _control(SUBREAPER, 1)
    try:
        sys.path[:], module, name, first, seconds = pipe.recv()
        function = _load(module, name)
        for argument in first:  # all children inherit what these calls import and cache
            function(argument)
    except Exception as error:
        pipe.send(("failed", portable(error)))
        return
    limit(resource.RLIMIT_DATA, MEMORY_BYTES)
    limit(resource.RLIMIT_CORE, 0)
    while True:
        child = os.fork()
        if not child:
            os.setsid()
            _control(PDEATHSIG, signal.SIGKILL)
            _serve(pipe, function, seconds)
        status = _end_of(child, pipe, trainer)
        _end_rest(child)
        # With any other status, the child was killed because it hung, or its call crashed it.
        if status == CLOSED:
            return


def _load(module: str | None, name: Any) -> Any:
    if module is None:
        return pickle.loads(name)
    function: Any = import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    return function


def _end_of(child: int, pipe: Connection, trainer: int) -> int:
    """Wait for a child's end and return its status; kill it if the training process has ended."""
    try:
        descriptor = os.pidfd_open(child)
    except (AttributeError, OSError):  # not Linux, or an old kernel; the limit on CPU time must do
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.register(pipe.fileno(), 0)  # reports only that the other side was closed
    happened: dict[int, int] = {}
    while not happened and os.getppid() == trainer:
        happened = dict(poll.poll(LOOK_SECONDS * 1000))
        for orphan in set(_children()) - {child}:  # without a wait they remain zombies
            with suppress(ChildProcessError):
                os.waitpid(orphan, os.WNOHANG)
    os.close(descriptor)
    if descriptor in happened:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return CLOSED


def _end_rest(child: int) -> None:
    """Kill what a child has left running: its session, and orphans in other sessions."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    while orphans := _children():
        for orphan in orphans:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(orphan, signal.SIGKILL)
        for orphan in orphans:
            with suppress(ChildProcessError):
                os.waitpid(orphan, 0)  # when it returns, the orphan's children are ours


def _children() -> list[int]:
    """Return the ids of this process's children; an empty list if /proc does not show them."""
    me = os.getpid()
    try:
        return [int(c) for c in Path(f"/proc/{me}/task/{me}/children").read_text().split()]
    except OSError:
        return []


def _control(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _serve(pipe: Connection, function: Any, seconds: float) -> NoReturn:
    try:
        pipe.send(("ready", os.getpid()))
        while True:
            ticket, argument = pipe.recv()
            # If the parent has ended and cannot kill a hanging call, the kernel does.
            limit(resource.RLIMIT_CPU, int(time.process_time() + 2 * seconds) + 2)
            try:
                answer = pickle.dumps(("done", ticket, function(argument), None))
            except Exception as error:
                answer = pickle.dumps(("done", ticket, None, portable(error)))
            pipe.send_bytes(answer)
    except (EOFError, OSError):
        os._exit(CLOSED)
    finally:
        os._exit(1)


def portable(error: Exception) -> Exception:
    """Return the error if it can be pickled, else a ``RuntimeError`` with its class and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}"[:1000])
    return error


def limit(which: int, value: int) -> None:
    """Lower one of this process's resource limits to ``value``, at most its hard limit."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value if hard < 0 else min(value, hard), hard))
