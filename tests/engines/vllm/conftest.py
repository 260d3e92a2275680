"""Fixtures: models for the cases that run vLLM for real."""

from __future__ import annotations

from typing import Any

import pytest

from kdrl_lightning.models.loading import load_causal_lm


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    """The model in the ``folder`` of a module."""
    return load_causal_lm(folder)
