"""The runs of a session."""

from __future__ import annotations

import pytest
from strategy_runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs of this session; each strategy's processes start when first asked for."""
    return Runs(tmp_path_factory.mktemp("strategies"))
