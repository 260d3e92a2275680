"""The tables of ``docs/methods/self_teachers.md``: which objective takes which teacher."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.objective_steps import PRESETS, make
from kdrl_lightning import (
    AdapterOffTeacher,
    LocalTeacher,
    RolloutSettings,
    RoutedTeacher,
    SelfTeacher,
    ServerTeacher,
    TransformersEngine,
    objectives,
)
from kdrl_lightning.engines import Sampling
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.objectives import Objective
from kdrl_lightning.rollout.groups import GroupShare
from kdrl_lightning.rollout_batch import TEACHER
from kdrl_lightning.teachers import (
    HardSync,
    InitialWeights,
    LiveWeights,
    MovingAverage,
    Teacher,
    TrustRegion,
)
from kdrl_lightning.teachers.frozen import FrozenModels, check_given
from kdrl_lightning.trainer.checks.groups import check_policy, check_teacher_completions

PAGE = (Path(__file__).parents[2] / "docs/methods/self_teachers.md").read_text()
COLUMNS = ["nothing", "sampled tokens", "student's top-k", "full vocabulary", "its completions"]
COLUMNS += ["its own top-k", "its entropy"]


class OwnPrompt(SelfTeacher):
    """As a wrapper with its own prompt."""

    has_own_prompt = True


TEACHERS: dict[str, Callable[[str], Teacher]] = {
    "`LocalTeacher`": LocalTeacher,
    "`ServerTeacher`": lambda folder: ServerTeacher(folder, ["http://127.0.0.1:1"], "key"),
    "`AdapterOffTeacher`": lambda folder: AdapterOffTeacher(),
    "`RoutedTeacher`": lambda folder: RoutedTeacher({"a": LocalTeacher(folder)}),
    "`InitialWeights`": lambda folder: SelfTeacher(InitialWeights()),
    "`MovingAverage`": lambda folder: SelfTeacher(MovingAverage()),
    "`HardSync`": lambda folder: SelfTeacher(HardSync()),
    "`TrustRegion`": lambda folder: SelfTeacher(TrustRegion()),
    "`LiveWeights` with its own prompt": lambda folder: OwnPrompt(LiveWeights()),
    "`LiveWeights` with the student's prompt": lambda folder: SelfTeacher(LiveWeights()),
}
REASONS = {
    1: r"must give hidden states for a divergence over the full vocabulary",
    2: r"must be one that can generate for `teacher_completions`",
    3: r"its KL is 0 and teaches nothing",
    4: r"must give hidden states to name its own most likely tokens",
    5: r"must return its entropy for PublishedSRPO",
}


def table(first: str) -> list[list[str]]:
    """The cells of the table whose header begins with ``first``."""
    found = re.search(rf"^\| {first} \|.*\n\|[- |]+\|\n((?:\|.*\n)+)", PAGE, re.M)
    assert found is not None
    return [[c.strip() for c in row.strip("|").split(" | ")] for row in found[1].splitlines()]


def column(objective: Any) -> str:
    """What an objective reads of the teacher."""
    if getattr(objective, "teacher_tokens", None) is not None:
        return "its completions"
    if objective.divergence is not None:
        return "full vocabulary"
    if objective.teacher_top_k:
        return "its own top-k"
    if objective.needs_teacher_entropy:
        return "its entropy"
    if objective.top_k:
        return "student's top-k"
    return "sampled tokens" if objective.needs_teacher else "nothing"


def check(objective: Objective, teacher: Teacher, student: str, completions: int) -> None:
    """All checks of a run that look at both, before weights are loaded."""
    check_given(teacher, objective, adapters=teacher.needs_lora)
    frozen = FrozenModels(teacher)
    frozen.check(load_tokenizer(student), student, objective)
    engine, settings = TransformersEngine(), RolloutSettings(group_size=4)
    share = GroupShare(TEACHER, TransformersEngine(), completions, Sampling(9))
    check_policy(objective, teacher, settings, engine)
    check_teacher_completions(objective, teacher, share, engine)


@pytest.mark.parametrize("name", TEACHERS)
def test_every_objective_takes_the_teachers_of_the_table(name: str, student_folder: str) -> None:
    cells = {row[0].strip("| "): row[1:] for row in table("teacher")}
    assert list(cells) == list(TEACHERS)
    used = set()
    for preset in PRESETS:
        objective = make(preset)
        reads = column(objective)
        used.add(reads)
        said = cells[name][COLUMNS.index(reads)].strip("| ")
        teacher = TEACHERS[name](student_folder)
        number = re.fullmatch(r"no \((\d)\)", said)
        completions = int(reads == "its completions")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if number is None:
                assert said == ("measured" if reads == "nothing" else "yes"), (name, reads)
                check(objective, teacher, student_folder, completions)
                continue
            with pytest.raises(ConfigurationError, match=REASONS[int(number[1])]):
                check(objective, teacher, student_folder, completions)
    assert used == set(COLUMNS)


def test_every_objective_has_a_row_on_what_makes_sense() -> None:
    rows = table("objective")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    every = {
        name
        for name in objectives.__all__
        if isinstance(getattr(objectives, name), type)
        and issubclass(getattr(objectives, name), Objective)
    }
    assert every - {"Objective"} <= named
    assert all(len(row) == 3 and all(row) for row in rows)
