"""Runs the command line in processes that have already imported the library.

Importing torch, Lightning and transformers takes six seconds of a core, and the tests of killed and
distributed runs start dozens of processes. Here each is a fork of one process that has imported
them; it is a separate process in every other respect, in a separate session. If the run starts
a second rank, that is a fork too, made before the first rank began.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from helpers.ports import free_port

WRITTEN = ("stdout.txt", "stderr.txt")


class Forks:
    """Forks of one process that has imported modules; it starts when the first is asked for."""

    def __init__(self, *modules: str) -> None:
        # multiprocessing keeps one such process; this is another, with other modules.
        self._server: Any = multiprocessing.forkserver.ForkServer()
        self._server.set_forkserver_preload([__name__, *modules])

    def start(self, target: Callable[..., None], arguments: Sequence[Any]) -> ForkServerProcess:
        """Start a process that calls a function, which another process must be able to import."""
        process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
        connect = self._server.connect_to_new_process
        with mock.patch("multiprocessing.forkserver.connect_to_new_process", connect):
            process.start()
        return process


LIBRARY = ("kdrl_lightning.cli.main", "kdrl_lightning.callbacks", "kdrl_lightning.tiny")
FORKS = Forks(*LIBRARY)


def run(
    arguments: list[str],
    folder: Path,
    env: dict[str, str],
    timeout: float = 240,
    forks: Forks = FORKS,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m kdrl_lightning`` with arguments in a folder, to its end.

    Returns:
        The exit code (minus the signal's number, if one ended it), what it printed and its errors.
    """
    return _ended(forks.start(_start, (arguments, folder, env)), arguments, folder, timeout)


def run_pytest(
    arguments: list[str], folder: Path, env: dict[str, str], timeout: float, forks: Forks = FORKS
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m pytest`` with arguments in a folder, to its end; see ``run``."""
    with TemporaryDirectory() as said:
        process = forks.start(_pytest, (arguments, folder, env, Path(said)))
        return _ended(process, arguments, Path(said), timeout)


def _ended(
    process: ForkServerProcess, arguments: list[str], said: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Wait for a process; return its exit code, its output and its errors."""
    process.join(timeout)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        raise subprocess.TimeoutExpired(arguments, timeout)
    texts = [(said / name).read_text() for name in WRITTEN]
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def run_ranks(
    script: str, arguments: Sequence[Sequence[str]], env: dict[str, str], timeout: float = 300
) -> None:
    """Run a script in processes of one group, with the variables that torchrun sets.

    Args:
        script: file of the script.
        arguments: arguments of each rank.
        env: environment variables of all ranks.
        timeout: seconds after which the ranks are ended.

    Raises:
        AssertionError: a rank has failed; the others are ended, and the message has its errors.
    """
    world, port = str(len(arguments)), str(free_port())
    group = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    if len(arguments) == 1:
        group = {}
    with TemporaryDirectory() as folder:
        ranks = []
        for rank, own in enumerate(arguments):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if group else {}
            (home := Path(folder, str(rank))).mkdir()
            start = (script, list(own), home, {**env, **group, **place})
            ranks.append(FORKS.start(_script, start))
        _wait(ranks, timeout)
        said = [(Path(folder, str(rank)) / WRITTEN[1]).read_text() for rank in range(len(ranks))]
        codes = [rank.exitcode for rank in ranks]
    assert not any(codes), f"exit codes {codes}: " + "\n".join(text[-4000:] for text in said)


def _wait(ranks: Sequence[ForkServerProcess], timeout: float) -> None:
    """Wait until all ranks have ended; end the others if one fails or the time is up."""
    deadline = time.monotonic() + timeout
    while any(rank.exitcode is None for rank in ranks):
        if any(rank.exitcode for rank in ranks) or time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)


def _script(script: str, arguments: list[str], folder: Path, env: dict[str, str]) -> None:
    _write_into(folder)
    become(arguments, env, os.getcwd())
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")


def _start(arguments: list[str], folder: Path, env: dict[str, str]) -> None:
    os.setsid()
    _write_into(folder)
    _let_second_ranks_wait()
    _command_line(arguments, env, str(folder))


def _pytest(arguments: list[str], folder: Path, env: dict[str, str], said: Path) -> None:
    os.setsid()
    _write_into(said)
    become(arguments, env, str(folder))
    runpy.run_module("pytest", run_name="__main__", alter_sys=True)


def _write_into(folder: Path) -> None:
    """Redirect this process's output and errors into files."""
    for number, name in enumerate(WRITTEN, 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)


def _command_line(arguments: list[str], env: dict[str, str], folder: str) -> None:
    become(arguments, env, folder)
    runpy.run_module("kdrl_lightning", run_name="__main__", alter_sys=True)


def become(arguments: list[str], env: dict[str, str], folder: str) -> None:
    """Give this process the environment, folder and arguments of the one that it stands in for."""
    gc.freeze()  # the garbage collector need not visit what was imported
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path[:0] = ["", *env.get("PYTHONPATH", "").split(":")]
    sys.argv[1:] = arguments
    # torch has read these when it was imported.
    import torch

    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    if env.get("TORCHDYNAMO_DISABLE") == "1":
        torch._dynamo.config.disable = True


def _let_second_ranks_wait() -> None:
    """Fork a process that becomes rank 1 if Lightning's launcher starts one, and ends otherwise."""
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
