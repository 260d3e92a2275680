"""Fixtures: random models of the embedded task's architecture, small enough for every test."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in processes that tests start

import pytest
import torch

from helpers.processes.two_ranks import TwoRanks
from kdrl_lightning.tiny.models import Recipe, save_untrained

# A plugin that vLLM loads, and a module that ends its process, in separate processes.
collect_ignore = ["helpers/with_vllm/store_transfer.py", "helpers/rewards/ends_at_once.py"]
# Fixtures, not tests; several files of one name cannot be imported for their docstrings.
collect_ignore_glob = ["*conftest.py"]

# Where Lightning and torchrun tell a process which group it belongs to, and where that group meets.
GROUP = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE")

RECIPE = Recipe(width=64, layers=1, steps=1, lr=1e-3, muon=False)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector away from the two million objects of 12,000 tests, which stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, on which such small models are fastest; no arguments of pytest's for a CLI.

    What a test leaves in the environment ends with it. A fixture of a whole module that trains
    runs before this one: the address of its process group goes too, or the next test that starts
    processes asks for a port in use.
    """
    for name in GROUP:
        os.environ.pop(name, None)
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def _end_group() -> Iterator[None]:
    """End the process group that tests leave: to Lightning the next run is distributed."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


_group_ends = pytest.fixture(_end_group, scope="module", autouse=True)
ends_the_group = pytest.fixture(_end_group, name="ends_the_group")


@pytest.fixture
def pictures() -> None:
    """Let the runs of a test draw their pictures."""


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no pictures, which takes longer than they do, unless a test has ``pictures``."""
    if "pictures" in request.fixturenames:
        return
    for name in ("report.plot_curves", "imitation_stats.plot_imitation"):
        monkeypatch.setattr(f"kdrl_lightning.callbacks.{name}", lambda *_: None)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, student_folder: str) -> TwoRanks:
    """What two real processes left; they start when it is first asked for."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    return TwoRanks(root / "two_ranks", student_folder)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder with a random Qwen2 and the character tokenizer."""
    folder: Path = tmp_path_factory.mktemp("student")
    save_untrained(RECIPE, folder, seed=0)
    return str(folder)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another random model with the same tokenizer."""
    folder: Path = tmp_path_factory.mktemp("teacher")
    save_untrained(RECIPE, folder, seed=1)
    return str(folder)
