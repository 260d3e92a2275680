"""Runs the command line in this process; returns what it builds, or its error line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdrl_lightning.__main__ import main
from kdrl_lightning.cli.main import KDRLCLI


def addition_run(student: str, **model: Any) -> dict[str, Any]:
    """Return the settings of a step on column addition; ``model`` adds to the model's."""
    prompts = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 8}}
    return {
        "model": {"student": student, "objective": {"class_path": "GRPO"}, **model},
        "data": {
            "train_prompts": prompts,
            "val_prompts": prompts,
            "reward": "kdrl_lightning.tiny.addition_reward",
            "rollout": {"prompts_per_rollout": 4, "group_size": 2, "max_tokens": 8},
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }


# A model that is never loaded, and three rows.
CONFIG = """
model: {student: some/model, objective: {class_path: GRPO}}
data:
  train_prompts: [{prompt: "1"}, {prompt: "2"}, {prompt: "3"}]
  val_prompts: [{prompt: "1"}]
  reward: kdrl_lightning.tiny.addition_reward
trainer: {max_steps: 1, accelerator: cpu, logger: false}
"""


def made(*args: str) -> KDRLCLI:
    """Build trainer, model and data of a command line without a subcommand."""
    return KDRLCLI.run(list(args), instantiate_only=True)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Return the one line with which the program refuses a command line."""
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line.removeprefix("error: ")


def refusal(start: Any, capsys: pytest.CaptureFixture[str], *flags: str, code: int = 2) -> str:
    """Return the one line with which a run of the fixture ``start`` ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        start(*flags)
    assert error.value.code == code
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def version(number: int) -> Path:
    """Return the folder of a run's logs, below the working folder."""
    return Path(f"runs/kdrl_lightning/version_{number}")
