"""Real vLLM servers on loopback, started as a user starts them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from helpers.ports import free_port
from helpers.processes.ready import become
from helpers.with_vllm.need import FORKS

KEY = "a key of the tests"


class RealServer:
    """``python -m kdrl_lightning serve`` for a folder.

    It starts in a fork of a process that has imported vLLM, which saves two thirds of its start;
    ``start(as_a_user=True)`` starts it in a new Python.
    """

    key = KEY

    def __init__(
        self,
        model: str,
        log: Path,
        max_model_len: int = 128,
        flags: Sequence[str] = (),
        vllm_flags: Sequence[str] = (),
    ) -> None:
        self.port = free_port()
        self.log = log
        self._flags = [*flags, "--model", model, "--port", str(self.port), "--dtype", "float32"]
        self._flags += ["--max-model-len", str(max_model_len)]
        self._flags += [
            "--kv-cache-memory-bytes",
            str(64 << 20),
            "--",
            "--enforce-eager",
            *vllm_flags,
        ]
        self.start(as_a_user=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, as_a_user: bool) -> None:
        environment = {
            "VLLM_API_KEY": KEY,
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in the process of the engine
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}",
        }
        env = {**os.environ, **environment}
        if as_a_user:
            command = [sys.executable, "-m", "kdrl_lightning", "serve", *self._flags]
            with open(self.log, "ab") as out:
                started = subprocess.Popen(
                    command,
                    env=env,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # its workers die with it
                )
            self._pid, self._ended = started.pid, started.wait
            return
        arguments = (["serve", *self._flags], env, self.log)
        if "vllm" in sys.modules:
            fork = multiprocessing.get_context("fork")
            process: Any = fork.Process(target=_serve, args=arguments)
            process.start()
        else:
            process = FORKS.start(_serve, arguments)
        self._pid, self._ended = process.pid, process.join

    def wait(self, seconds: float = 180.0) -> None:
        """Wait until the server is healthy."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.2)
        raise TimeoutError(f"no server after {seconds} s: {self.log}")

    def kill(self) -> None:
        """Kill the server as if its machine went down; do nothing if it is dead."""
        if self._pid is None:
            return
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._pid, signal.SIGKILL)
        self._ended(30)
        self._pid = None


def _serve(arguments: list[str], env: dict[str, str], log: Path) -> None:
    """Become a server, as ``python -m kdrl_lightning`` with these arguments becomes one."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    become(arguments, env, os.getcwd())

    def replace(python: str, command: list[str], variables: dict[str, str]) -> NoReturn:
        os.environ.update(variables)
        _, _, module, *sys.argv[1:] = command  # python -m module arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        raise SystemExit

    os.execve = replace  # type: ignore[assignment]
    # The engine's process, too, is a fork; on a CPU vLLM starts a new Python for it.
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment, misc]
    runpy.run_module("kdrl_lightning", run_name="__main__", alter_sys=True)
