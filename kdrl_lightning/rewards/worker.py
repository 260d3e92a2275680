"""The process that ``WorkerPool`` starts: imports a function once, forks children that call it.

Its argument is the number of an open pipe. It is a new interpreter with one thread, which has not
seen what the training process has started, so that forking is safe; a child that was killed is
replaced in milliseconds, without another import.
"""

from __future__ import annotations

import os
import pickle
import resource
import sys
import time
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, NoReturn

MEMORY_BYTES = 2 << 30
CLOSED = 113  # how a child ends whose pipe was closed


def main(descriptor: int) -> None:
    """Serve until the pipe is closed.

    First come what to import, arguments to try it on, and the time limit; then one ``(ticket,
    argument)`` after the other. Answers are ``("ready", process)`` from each child, ``("done",
    ticket, result, error)``, or ``("failed", error)`` if the function cannot be imported, or fails
    at what it is tried on.
    """
    pipe = Connection(descriptor)
    try:
        sys.path[:], module, name, first, seconds = pipe.recv()
        function: Any = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
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
            _serve(pipe, function, seconds)
        # Any other end: it was killed for hanging, or died of its work.
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == CLOSED:
            return


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
