"""Fixture: a math reward whose processes all tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kdrl_lightning.rewards import MathReward


@pytest.fixture(scope="module")
def math_reward() -> Iterator[MathReward]:
    """``MathReward`` with one process, which the tests of a file share."""
    reward = MathReward(time_limit_s=20.0, workers=1)
    reward.start()
    yield reward
    reward.close()
