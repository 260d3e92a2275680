"""If the first process fails while another waits for it, both end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.with_vllm.need import ROOT
from kdrl_lightning.errors import Interrupted
from kdrl_lightning.trainer import strategies
from kdrl_lightning.trainer.strategies import end_children

DRIVER = ROOT / "tests/helpers/processes/first_rank_driver.py"


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's list of processes")
def test_no_process_waits_for_one_that_has_failed(tmp_path: Path, student_folder: str) -> None:
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, str(DRIVER), str(tmp_path), student_folder],
        env={**os.environ, **paths},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "waits").exists():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.2)
    waits = int((tmp_path / "waits").read_text())
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert errors.strip().endswith('KeyError: "someone\'s callback"')
    assert not is_running(waits)


def children(seconds: str) -> Any:
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
    return SimpleNamespace(launcher=SimpleNamespace(procs=[child]))


def test_processes_that_end_by_themselves_are_left_alone() -> None:
    strategy = children("0.1")
    (child,) = strategy.launcher.procs
    end_children(strategy, ValueError())
    assert child.returncode == 0


@pytest.mark.parametrize(
    "error", [Interrupted("stopped by SIGTERM: saved.", 15), KeyboardInterrupt()]
)
def test_after_a_signal_all_end_by_themselves(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(strategies, "WAITS_S", 0.1)
    strategy = children("30")
    (child,) = strategy.launcher.procs
    end_children(strategy, error)
    assert child.poll() is None
    child.kill()
    child.wait()


def test_a_strategy_without_processes() -> None:
    end_children(SimpleNamespace(launcher=None), ValueError())  # type: ignore[arg-type]
