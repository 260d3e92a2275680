"""Fixtures: settings for comparisons with other libraries."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL warns on import of its experimental parts, and warnings are errors here."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
