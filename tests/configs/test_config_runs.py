"""Every configuration makes one rollout and takes its updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.cli.main import KDRLCLI

ROOT = Path(__file__).parents[2]
CONFIGS = [
    *sorted((ROOT / "configs").glob("*.yaml")),
    *sorted((ROOT / "configs/self_teachers").glob("*.yaml")),
]


def model_flags(teacher: dict[str, Any], folder: str, at: str = "model.teacher") -> list[str]:
    """Flags that name the model of a teacher, or of the one inside; a self-teacher has none."""
    inside = teacher.get("init_args", {})
    if "teacher" in inside:
        return model_flags(inside["teacher"], folder, f"{at}.init_args.teacher")
    return [f"--{at}.init_args.model={folder}"] if "model" in inside else []


# A random model stops late and is rarely right.
@pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_config_trains(
    path: Path, tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    teacher = load_with_base(path.read_text(), str(path))["model"].get("teacher")
    # Rewards that a random model gets, so that there is something to learn from; DAPO's own
    # penalty on length is one. Feedback is that of the configuration's reward.
    reward = (
        []
        if path.stem in ("dapo", "sdpo_feedback")
        else ["--data.reward=helpers.short_runs.some_reward"]
    )
    updates = 4 if path.stem.startswith("rlad") else 2
    flags = [
        f"--model.student={student_folder}",
        *(model_flags(teacher, teacher_folder) if teacher else []),
        *reward,
        "--data.train_prompts.size=16",
        "--data.val_prompts.size=2",
        "--data.rollout.prompts_per_rollout=4",
        f"--trainer.fast_dev_run={updates}",
        f"--trainer.default_root_dir={tmp_path}",
        "--report.evaluate_teacher=false",
    ]
    cli = KDRLCLI.run(["fit", "--config", str(path), *flags])
    assert (cli.trainer.global_step, cli.datamodule.watch.rollouts) == (updates, 1)
    assert cli.model.skipped_steps == 0
    assert (cli.model.teacher_seconds > 0.0) == (cli.model.teacher is not None)
    assert not teacher or cli.model.teacher is not None
    start = load_file(Path(student_folder) / "model.safetensors")
    trained = cli.model.student.model.state_dict()
    assert not all(torch.equal(trained[name], start[name]) for name in start)
