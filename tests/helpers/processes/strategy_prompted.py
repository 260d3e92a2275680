"""Cases of the driver: teachers with their own prompt, two updates of one rollout each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers.processes.strategy_family import two_steps
from kdrl_lightning import (
    KDRL,
    OPSD,
    RLAD,
    SDPO,
    CachedTeacher,
    KDRLModule,
    LocalTeacher,
    LoRA,
    PromptedTeacher,
    PublishedHDPO,
    RolloutDataModule,
    RolloutSettings,
    RoutedTeacher,
    SelfTeacher,
    Teacher,
    TeacherCompletions,
    TeacherPrompt,
)
from kdrl_lightning.objectives import Objective, PublishedSRPO
from kdrl_lightning.prompts import PromptSource
from kdrl_lightning.rewards import Sample, Verdict
from kdrl_lightning.teachers import (
    HardSync,
    InitialWeights,
    LiveWeights,
    MovingAverage,
    TrustRegion,
)
from kdrl_lightning.teachers.own_prompt.contexts import (
    ColumnContext,
    Context,
    FeedbackContext,
    SiblingContext,
)
from kdrl_lightning.tiny import ColumnAddition

COLUMN, SIBLING, FEEDBACK = ColumnContext("solution"), SiblingContext(), FeedbackContext()


class Rows(PromptSource):
    """Rows of which some have no solution, so that one rank may have nothing to imitate."""

    def __init__(self) -> None:
        self.rows = ColumnAddition(24, seed=1, digits=2, solutions=True)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        solution = row["solution"] if index % 3 else ""
        return {**row, "solution": solution, "teacher": "a" if index % 2 else "b"}


def judge(sample: Sample) -> Verdict:
    """Accept about half of a random model's completions; feedback on a wrong one is its length."""
    right = len(sample.ids) % 2 == 1
    return Verdict(float(right), right, feedback="" if right else str(len(sample.ids)))


def own(teacher: Teacher, context: Context) -> Teacher:
    return PromptedTeacher(teacher, TeacherPrompt(context, "{context}#{prompt}"))


# Name -> objective, teacher of a folder, and a student with adapters.
CASES: dict[str, tuple[Callable[[], Objective], Callable[[Path, Path], Teacher], bool]] = {
    "kdrl, shaping": (
        lambda: KDRL(0.5, form="reward_shaping"),
        lambda f, o: own(local(f), SIBLING),
        False,
    ),
    "rlad, cached": (
        RLAD,
        lambda f, o: own(CachedTeacher(local(f), str(o / "prompted.db")), SIBLING),
        False,
    ),
    "kdrl, routed": (
        lambda: KDRL(0.5),
        lambda f, o: RoutedTeacher({"a": own(local(f), COLUMN), "b": local(f)}),
        False,
    ),
    "opsd, trust region": (OPSD, lambda f, o: own(SelfTeacher(TrustRegion(0.3)), COLUMN), False),
    "sdpo, average": (
        lambda: SDPO(top_k=5),
        lambda f, o: own(SelfTeacher(MovingAverage(0.3)), SIBLING),
        False,
    ),
    "srpo, feedback": (
        lambda: PublishedSRPO(top_k=5),
        lambda f, o: own(SelfTeacher(HardSync(1)), FEEDBACK),
        False,
    ),
    "hdpo, live": (
        lambda: PublishedHDPO(top_k=4),
        lambda f, o: own(SelfTeacher(LiveWeights()), COLUMN),
        False,
    ),
    "opsd, adapters": (OPSD, lambda f, o: own(SelfTeacher(InitialWeights()), COLUMN), True),
    "sdpo, adapters": (
        lambda: SDPO(top_k=5),
        lambda f, o: own(SelfTeacher(MovingAverage(0.3)), SIBLING),
        True,
    ),
}


def local(folder: Path) -> LocalTeacher:
    return LocalTeacher(str(folder / "teacher"), "float64")


def run_prompted(folder: Path, out: Path, strategy: str) -> dict[str, Any]:
    """Return losses, weights and the share of completions with a context of each case."""
    seen: dict[str, Any] = {}
    for name, (objective, teacher, adapters) in CASES.items():
        module = KDRLModule(
            str(folder / "student"),
            objective(),
            teacher(folder, out),
            partial(torch.optim.SGD, lr=0.05),
            lora=LoRA(3, 8.0, ["q_proj", "v_proj"]) if adapters else None,
        )
        answers = int(name.startswith("hdpo"))
        data = RolloutDataModule(
            Rows(),
            judge,
            rollout=RolloutSettings(
                prompts_per_rollout=8,
                group_size=3 - answers,
                max_tokens=12,
                minibatches_per_rollout=2,
            ),
            teacher_completions=TeacherCompletions(answers),
        )
        seen[name] = two_steps(module, data, strategy, out)
    return seen
