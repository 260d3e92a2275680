"""The callback that profiles one optimizer step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning.callbacks import StepProfile
from kdrl_lightning.cli.main import KDRLCLI
from kdrl_lightning.errors import ConfigurationError

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")


@pytest.mark.parametrize("steps", [4, 6])
def test_it_names_phases_and_operators(
    tmp_path: Path, student_folder: str, teacher_folder: str, steps: int
) -> None:
    profile = StepProfile(rollout=1, operators=3)
    module = make_module(student_folder, teacher_folder)
    fit(tmp_path, module, make_data(), [profile], max_steps=steps)
    phases = profile.text.splitlines()[0]
    for phase in ("sync", "rollout", "score", "teacher", "updates"):
        assert re.search(rf" {phase} [\d.e-]+ s", phases), phase
    assert "aten::" in profile.text and "Self CPU" in profile.text


@pytest.mark.parametrize("asked", [True, False])
def test_the_command_line_asks_for_it(
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    asked: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [
        f"--config={Path(__file__).parents[2]}/configs/rlad.yaml",
        f"--model.student={student_folder}",
        f"--model.teacher.model={teacher_folder}",
        "--data.train_prompts.size=8",
        "--data.val_prompts.size=2",
        "--data.rollout.prompts_per_rollout=4",
        "--trainer.max_steps=8",
        f"--trainer.default_root_dir={tmp_path}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--report.evaluate_teacher=false",
    ]
    KDRLCLI.run(["fit", *flags, *(["--profile"] if asked else [])])
    assert ("phases of the rollout: " in capsys.readouterr().out) == asked
    saved = [yaml.safe_load(file.read_text()) for file in tmp_path.rglob("config.yaml")]
    assert [config["profile"] for config in saved] == [asked]


def test_the_first_rollout_cannot_be_profiled() -> None:
    with pytest.raises(ConfigurationError, match=r"`rollout` must be at least 1: got 0"):
        StepProfile(rollout=0)
    with pytest.raises(ConfigurationError, match=r"`operators` must be at least 1: got 0"):
        StepProfile(operators=0)
