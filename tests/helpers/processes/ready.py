"""The command line in processes that have imported the library before they start.

Importing torch, Lightning and transformers takes six seconds of a core, and the tests of killed and
distributed runs start dozens of processes. Here each is a fork of one process that has imported
them; it is a process of its own in every other respect, in a session of its own. If the run starts
a second rank, that is a fork too, made before the first rank began.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

LIBRARY = ["kdrl_lightning.cli.main", "kdrl_lightning.callbacks", "kdrl_lightning.tiny"]

WRITTEN = ("stdout.txt", "stderr.txt")


@cache
def forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LIBRARY])
    return context


def run(
    arguments: list[str], folder: Path, env: dict[str, str], timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m kdrl_lightning`` with arguments in a folder, to its end.

    Returns:
        The exit code (minus the signal's number, if one ended it), what it printed and its errors.
    """
    process = forks().Process(target=_start, args=(arguments, folder, env))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        raise subprocess.TimeoutExpired(arguments, timeout)
    said = [(folder / name).read_text() for name in WRITTEN]
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def _start(arguments: list[str], folder: Path, env: dict[str, str]) -> None:
    os.setsid()
    for number, name in enumerate(WRITTEN, 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    _let_second_ranks_wait()
    _command_line(arguments, env, str(folder))


def _command_line(arguments: list[str], env: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path[:0] = ["", *env.get("PYTHONPATH", "").split(":")]
    sys.argv[1:] = arguments
    runpy.run_module("kdrl_lightning", run_name="__main__", alter_sys=True)


def _let_second_ranks_wait() -> None:
    """Fork a process that becomes rank 1 if Lightning's launcher asks for it, and ends if not."""
    wanted, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        with os.fdopen(wanted, "rb") as file:
            told = file.read()
        if not told:
            os._exit(0)
        _command_line(*pickle.loads(told))
        return
    os.close(wanted)

    from lightning.pytorch.strategies.launchers import subprocess_script

    class Rank(subprocess.Popen[bytes]):
        """The handle that Lightning keeps of its second rank."""

        def __init__(self, command: list[str], env: dict[str, str], cwd: str | None) -> None:
            super().__init__(["true"])
            self.wait()
            self.args, self.pid, self.returncode = command, pid, None
            with os.fdopen(tell, "wb") as file:  # python -m kdrl_lightning.__main__ arguments
                file.write(pickle.dumps((command[3:], env, cwd or os.getcwd())))

    launcher: Any = subprocess_script
    launcher.subprocess = type("Launcher", (), {"Popen": Rank})
