"""Real vLLM servers on loopback, started as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from helpers.ports import free_port

KEY = "a key of the tests"


class RealServer:
    """Runs ``python -m kdrl_lightning serve`` on a folder; it is healthy after some 20 s."""

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
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {
            "VLLM_API_KEY": KEY,
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in the process of the engine
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}",
        }
        with open(self.log, "ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kdrl_lightning", "serve", *self._flags],
                env={**os.environ, **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its workers die with it
            )

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
        if self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
