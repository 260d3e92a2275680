"""Fixture: a cache folder of downloaded and converted models for one test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the package keeps models, empty."""
    monkeypatch.setenv("KDRL_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
