"""The profile of one step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from short_runs import fit, make_data, make_module

from kdrl_lightning.callbacks import StepProfile
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


def test_the_first_rollout_cannot_be_profiled() -> None:
    with pytest.raises(ConfigurationError, match=r"`rollout` must be at least 1: got 0"):
        StepProfile(rollout=0)
    with pytest.raises(ConfigurationError, match=r"`operators` must be at least 1: got 0"):
        StepProfile(operators=0)
