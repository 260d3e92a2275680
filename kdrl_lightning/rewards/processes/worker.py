"""The process that ``WorkerPool`` starts: imports a function once, forks children that call it.

Its argument is the number of an open pipe. It is a new interpreter with one thread, which has not
seen what the training process has started, so that forking is safe; a child that was killed is
replaced in milliseconds, without another import. Processes that a child has started end with it:
they become children of this process, which kills them. If the training process is gone, this one
kills all and ends.
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

MEMORY_BYTES = 2 << 30
CLOSED = 113  # how a child ends whose pipe was closed
# Of prctl(2): the signal that a process gets when its parent ends; whose orphans come to us.
PDEATHSIG, SUBREAPER = 1, 36
LOOK_SECONDS = 0.5  # between looks for the training process, whose fork may keep the pipe open


def main(descriptor: int) -> None:
    """Serve until the pipe is closed.

    First come what to import, arguments to try it on, and the time limit; then one ``(ticket,
    argument)`` after the other. Answers are ``("ready", process)`` from each child, ``("done",
    ticket, result, error)``, or ``("failed", error)`` if the function cannot be imported, or fails
    at what it is tried on.
    """
    pipe, trainer = Connection(descriptor), os.getppid()
    _control(SUBREAPER, 1)
    try:
        sys.path[:], module, name, first, seconds = pipe.recv()
        function = _load(module, name)
        for argument in first:  # what it imports and caches, all children have
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
        # Any other end: it was killed for hanging, or died of its work.
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
    """Wait for a child's end; end it if the training process is gone, whatever it works on."""
    try:
        descriptor = os.pidfd_open(child)
    except (AttributeError, OSError):  # no Linux, or an old one: see the limit on its CPU time
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.register(pipe.fileno(), 0)  # reports nothing but that the other end is closed
    happened: dict[int, int] = {}
    while not happened and os.getppid() == trainer:
        happened = dict(poll.poll(LOOK_SECONDS * 1000))
        for orphan in set(_children()) - {child}:  # ours to wait for, or they stay as zombies
            with suppress(ChildProcessError):
                os.waitpid(orphan, os.WNOHANG)
    os.close(descriptor)
    if descriptor in happened:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return CLOSED


def _end_rest(child: int) -> None:
    """Kill what a child has left: its session, and orphans that made sessions of their own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    while orphans := _children():
        for orphan in orphans:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(orphan, signal.SIGKILL)
        for orphan in orphans:
            with suppress(ChildProcessError):
                os.waitpid(orphan, 0)  # its own orphans come to us before


def _children() -> list[int]:
    """Return this process's children; none where /proc does not say."""
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
            # If whoever started us is gone and cannot kill us, the kernel does.
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
    """Return an error that the other side can read, whatever class it has."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}"[:1000])
    return error


def limit(which: int, value: int) -> None:
    """Lower one of this process's limits."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value if hard < 0 else min(value, hard), hard))
