"""Starts the program in separate processes: short training runs, and servers."""

from __future__ import annotations

import csv
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from kdrl_lightning.hardware.doctor.bench import Bench

# Small: 4 prompts with 4 completions each, two optimizer steps per rollout.
SMALL = (
    "--config=kdrl",  # its loss is not 0 if all rewards are equal
    "--data.rollout.prompts_per_rollout=4",
    "--data.rollout.group_size=4",
    "--data.rollout.minibatches_per_rollout=2",
    "--data.rollout.rollouts_per_epoch=2",
    "--data.train_prompts.size=64",
    "--data.val_prompts.size=16",
)

# The model that servers load, and their context length.
SERVED, CONTEXT = "few-layers", 1024
# Seconds that a server may take to start.
PATIENCE = 240.0


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        code: exit code.
        output: text that it printed.
        folder: folder that it wrote to.
    """

    code: int
    output: str
    folder: Path

    @property
    def last_line(self) -> str:
        """The last line of the output that mentions an error; the last line if none does."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or [""])[-1][:300]

    def column(self, name: str) -> list[float]:
        """Return a column of the newest ``metrics.csv``, without empty cells."""
        newest = max(self.folder.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime)
        with newest.open() as lines:
            return [float(row[name]) for row in csv.DictReader(lines) if row.get(name)]


def fit(
    bench: Bench,
    name: str,
    *flags: str,
    devices: int = 1,
    limit: float = 200,
    env: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Train on the built-in task.

    Args:
        bench: the machine.
        name: name of the run's folder.
        flags: further flags, which override those of ``SMALL``.
        devices: number of processes.
        limit: seconds after which the run is killed.
        env: further environment variables.
    """
    folder = bench.folder / "runs" / name
    given = [
        "fit",
        *SMALL,
        f"--trainer.accelerator={'gpu' if bench.on_gpu else 'cpu'}",
        f"--trainer.devices={devices}",
        f"--trainer.default_root_dir={folder}",
        *flags,
    ]
    return program(given, folder, limit, env)


def program(arguments: Sequence[str], folder: Path, limit: float, env: Mapping[str, str]) -> Run:
    """Run ``python -m kdrl_lightning`` with arguments, and return the finished run."""
    process = subprocess.run(
        [sys.executable, "-m", "kdrl_lightning", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
        check=False,
        env={**os.environ, **env},
    )
    return Run(process.returncode, process.stdout, folder)


class Address(NamedTuple):
    """URL and API key of a server."""

    url: str
    key: str


@contextmanager
def served(
    bench: Bench, name: str, *flags: str, env: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Address]:
    """Start a vLLM server of the small model, without waiting until it answers; end it on exit.

    Args:
        bench: the machine.
        name: part of the name of its log file.
        flags: further flags of ``serve``.
        env: further environment variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = secrets.token_urlsafe(16)
    command = [sys.executable, "-m", "kdrl_lightning", "serve", "--model", bench.path(SERVED)]
    command += ["--port", str(port), "--max-model-len", str(CONTEXT), *flags]
    if bench.on_gpu:
        command += ["--gpu-memory-utilization", "0.3"]
    else:
        command += ["--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)]
    with (bench.folder / f"server-{name}.log").open("w") as log:
        given = {**os.environ, "VLLM_API_KEY": key, **env}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=given)
        try:
            yield Address(f"http://127.0.0.1:{port}", key)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
