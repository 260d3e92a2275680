"""The tasks, and the methods with the teachers that they are compared with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.self_cases.models import CITATION

# `Any`: settings, as JSON holds them.
ROOT = Path(__file__).parents[2]
_OBJECTIVE = "--model.objective.init_args"


@dataclass(frozen=True)
class Task:
    """A task whose rows have a column with the worked answer.

    Attributes:
        title: heading of its tables.
        student: model source of the student; it reads worked answers, so it is its own teacher.
        expert: model source of the external teacher.
        column: name of the column with the worked answer.
        flags: prompts and reward.
    """

    title: str
    student: dict[str, Any]
    expert: dict[str, Any]
    column: str
    flags: tuple[str, ...]


def _tiny(role: str, path: str = "kdrl_lightning.tiny.TinyModel", **init: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": {"role": role, **init}}


def _prompts(path: str, size: int, seed: int, **init: Any) -> str:
    return json.dumps({"class_path": path, "init_args": {"size": size, "seed": seed, **init}})


def _addition(title: str, student: dict[str, Any]) -> Task:
    source = "kdrl_lightning.tiny.ColumnAddition"
    return Task(
        title,
        student,
        expert=_tiny("teacher"),
        column="solution",
        flags=(
            f"--data.train_prompts={_prompts(source, 4096, 1, solutions=True)}",
            f"--data.val_prompts={_prompts(source, 512, 2, solutions=True)}",
            "--data.reward=kdrl_lightning.tiny.addition_reward",
        ),
    )


_RESIDUES = "benchmarks.residues.task.Residues"
# Training rewards the answer alone, so one wrong reasoning in three is rewarded.
_REWARDS = {
    "training": "benchmarks.residues.task.answer_reward",
    "validation": "benchmarks.residues.task.reasoning_reward",
}


def _mixed(name: str, size: int, seed: int) -> str:
    """Return prompts whose rows name their set, by which the reward is chosen."""
    sources = {name: {"class_path": _RESIDUES, "init_args": {"size": size, "seed": seed}}}
    settings = {"size": size, "seed": 0, "sources": sources}
    return json.dumps({"class_path": "MixedPrompts", "init_args": settings})


TASKS = {
    "addition": _addition("addition, slip 0.9", _tiny("reader")),
    "residues": Task(
        title="sums modulo 3, slip 0.8, rewarded for the answer alone",
        student=_tiny("reader", "benchmarks.self_cases.models.ResidueReader", slip=0.8),
        expert=_tiny("teacher", "benchmarks.residues.models.ResidueModel"),
        column="reasoning",
        flags=(
            f"--data.train_prompts={_mixed('training', 4096, 1)}",
            f"--data.val_prompts={_mixed('validation', 512, 2)}",
            "--data.reward="
            + json.dumps({"class_path": "RoutedReward", "init_args": {"rewards": _REWARDS}}),
            "--data.rollout.max_tokens=14",
        ),
    ),
    "citing": _addition(
        "addition, leakage on purpose",
        _tiny("reader", "benchmarks.self_cases.models.CitingReader"),
    ),
}


@dataclass(frozen=True)
class Arm:
    """A method with a teacher.

    Attributes:
        config: name of the file in ``configs``.
        teacher: ``none``; ``external``, the expert with the student's prompt; ``self``, the initial
            student, which is shown the worked answer; ``average`` (a = 0.05) or ``synced`` (every
            10 steps), later weights, which are shown it too; ``sibling``, the average, which is
            shown a successful completion of the group; ``other``, the initial student, which is
            shown the worked answer of another problem.
        flags: command-line flags that change the file's settings.
    """

    config: str
    teacher: str = "none"
    flags: tuple[str, ...] = field(default=())

    def command(self, task: Task) -> list[str]:
        """Return configuration and flags of a run on a task."""
        return [
            f"--config={ROOT / 'configs' / self.config}.yaml",
            *task.flags,
            f"--model.student={json.dumps(task.student)}",
            *([] if self.teacher == "none" else [f"--model.teacher={self._teacher(task)}"]),
            *self.flags,
        ]

    def _teacher(self, task: Task) -> str:
        if self.teacher == "external":
            return json.dumps({"class_path": "LocalTeacher", "init_args": {"model": task.expert}})
        column = {"class_path": "ColumnContext", "init_args": {"column": task.column}}
        context: dict[str, Any] = {
            "sibling": {"class_path": "SiblingContext"},
            "other": {"class_path": "OtherProblemContext", "init_args": {"context": column}},
        }.get(self.teacher, column)
        average = _rule("MovingAverage", student_weight=0.05)
        inner = {
            "average": average,
            "sibling": average,
            "synced": _rule("HardSync", every_n_steps=10),
        }.get(self.teacher)
        initial = {"class_path": "LocalTeacher", "init_args": {"model": task.student}}
        prompt = {"context": context, "template": "{context}#{prompt}"}
        settings = {"teacher": inner or initial, "prompt": prompt}
        return json.dumps({"class_path": "PromptedTeacher", "init_args": settings})


def _rule(name: str, **init: Any) -> dict[str, Any]:
    rule = {"class_path": name, "init_args": init}
    return {"class_path": "SelfTeacher", "init_args": {"weights": rule}}


def _rlad(teacher: str) -> Arm:
    clip = [f"{_OBJECTIVE}.{name}=0.2" for name in ("clip_low", "clip_high")]
    return Arm("rlad", teacher, tuple(clip))


ARMS = {
    "GRPO": Arm("grpo"),
    "KDRL, external": Arm("kdrl", "external"),
    "KDRL, self": Arm("kdrl", "self"),
    "RLAD, external": _rlad("external"),
    "RLAD, self": _rlad("self"),
    "OPSD": Arm("opsd", "self"),
    "SDPO": Arm("sdpo", "average"),
    "SDFT": Arm("sdft", "average"),
    "RLSD": Arm("rlsd_published", "synced"),
    "HDPO": Arm("hdpo_published", "self"),
    "on-policy distillation, external": Arm("on_policy_distillation", "external"),
    "on-policy distillation, self": Arm("on_policy_distillation", "self"),
    "SDPO, sibling": Arm("sdpo", "sibling"),
    "KDRL, self, other problem": Arm("kdrl", "other"),
}
# The teacher's first tokens refer to the solution, and an uncapped KL imitates them.
_UNCAPPED = (f"{_OBJECTIVE}.pointwise_clip=null", f"{_OBJECTIVE}.reduction=token_mean")
LEAKS = {
    "OPSD, uncapped, cites": Arm("opsd", "self", _UNCAPPED),
    "SDFT, cites": Arm("sdft", "average"),
    "KDRL, self, cites": Arm("kdrl", "self"),
    "KDRL, external, cites": Arm("kdrl", "external"),
}
EVERY_ARM = {**ARMS, **LEAKS}
HEALTH = {"class_path": "TeacherHealth", "init_args": {"window": 5, "phrases": [CITATION]}}
