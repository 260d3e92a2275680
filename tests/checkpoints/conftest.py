"""Runs of the program whose checkpoints are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdrl_lightning.__main__ import main


@pytest.fixture
def start(
    tmp_path: Path,
    student_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    no_pictures: None,
    ends_the_group: None,
) -> Any:
    """Run a subcommand of the program in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    prompts = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 8}}
    config = {
        "model": {"student": student_folder, "objective": {"class_path": "GRPO"}},
        "data": {
            "train_prompts": prompts,
            "val_prompts": prompts,
            "reward": "kdrl_lightning.tiny.addition_reward",
            "rollout": {
                "prompts_per_rollout": 4,
                "group_size": 2,
                "max_tokens": 8,
            },
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))

    def run(command: str, *flags: str) -> None:
        main([command, "--config", "run.yaml", *flags])

    return run
