"""Fixture: a configuration that tests of settings change."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.program import CONFIG
from kdrl_lightning.cli.settings.unused import take_notes


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and no note left from before."""
    monkeypatch.chdir(tmp_path)
    take_notes()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small configuration in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path
