"""Fixtures: runs of the program whose checkpoints tests inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.program import addition_run
from kdrl_lightning.__main__ import main


@pytest.fixture
def start(
    tmp_path: Path,
    student_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    ends_the_group: None,
) -> Any:
    """Run a subcommand of the program in a separate folder."""
    monkeypatch.chdir(tmp_path)
    config = addition_run(student_folder)
    config["trainer"]["max_steps"] = 2
    Path("run.yaml").write_text(yaml.safe_dump(config))

    def run(command: str, *flags: str) -> None:
        main([command, "--config", "run.yaml", *flags])

    return run
