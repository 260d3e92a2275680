"""Fixtures: runs that all tests of a session share."""

from __future__ import annotations

import os

import pytest

from helpers.processes.strategy_runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs of this session; each strategy's processes start when first asked for."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    return Runs(root / "strategies")
