"""The tasks: verifiers with errors, teachers with errors, and the regimes that they make."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.regime_cases.methods import ABLATION, MAIN, VARIANTS, Method

ROOT = Path(__file__).parents[2]


class Regime(NamedTuple):
    """A verifier and a teacher, by name."""

    verifier: str
    teacher: str


@dataclass(frozen=True)
class Task:
    """A task with its regimes.

    Attributes:
        title: heading of its tables.
        overlay: configuration of prompts and models, put after that of the method.
        exact: the reward that is always right, by import path; it judges validation rows.
        verifiers: rewards of the training rows by name.
        teachers: flags of the teacher's model by name.
        methods: names of the methods that get their runs first, and the search for a rate.
        variants: names of the other settings of these methods.
        ablation: names of the methods with gates.
        core: the regimes that get their seeds first.
        searched: the regimes in which the learning rate is searched; none: take the rates that the
            search in ``regimes`` has chosen.
    """

    title: str
    overlay: str
    exact: str
    verifiers: dict[str, dict[str, Any]]
    teachers: dict[str, list[str]]
    methods: list[str]
    variants: list[str]
    ablation: list[str]
    core: list[Regime]
    searched: list[Regime]

    @property
    def regimes(self) -> list[Regime]:
        """All regimes."""
        return [Regime(v, t) for t in self.teachers for v in self.verifiers]

    def flags(self, how: Method, verifier: str, teacher: str, seed: int) -> list[str]:
        """Return configurations and flags of a run; the verifier errs by the run's seed."""
        erring = json.loads(json.dumps(self.verifiers[verifier]))
        if "init_args" in erring:
            erring["init_args"]["seed"] = seed
        rewards = {"training": erring, "validation": self.exact}
        reward = {"class_path": "RoutedReward", "init_args": {"rewards": rewards}}
        files = [ROOT / f"configs/{how.config}.yaml", ROOT / self.overlay]
        return [
            *(f"--config={file}" for file in files),
            f"--data.reward={json.dumps(reward)}",
            *how.flags,
            *(self.teachers[teacher] if how.teacher else []),
        ]


def erring(exact: str, wrong: float, right: float) -> dict[str, Any]:
    """Return a verifier that accepts and rejects fractions of the wrong and right completions."""
    settings = {"reward": exact, "accepts_wrong": wrong, "rejects_right": right}
    return {"class_path": "kdrl_lightning.tiny.ErringVerifier", "init_args": settings}


_ADDED = "kdrl_lightning.tiny.addition_reward"
_MODEL = "--model.teacher.init_args.model.init_args"
_CORE = [
    Regime("accepts 60 % of wrong", "good"),
    Regime("exact", "forgets half"),
    Regime("accepts 30 % of wrong", "good"),
    Regime("accepts 30 % of wrong", "forgets half"),
    Regime("accepts 60 % of wrong", "forgets half"),
    Regime("accepts 60 % of wrong", "worse than student"),
]
ADDITION = Task(
    title="addition, slip 0.9",
    overlay="configs/base/erring_verifier.yaml",
    exact=_ADDED,
    verifiers={
        "exact": erring(_ADDED, 0.0, 0.0),
        "accepts 30 % of wrong": erring(_ADDED, 0.3, 0.0),
        "accepts 60 % of wrong": erring(_ADDED, 0.6, 0.0),
        "rejects 30 % of right": erring(_ADDED, 0.0, 0.3),
        "both 30 %": erring(_ADDED, 0.3, 0.3),
    },
    teachers={
        "good": [],
        "forgets half": [f"{_MODEL}.role=student", f"{_MODEL}.slip=0.5"],
        "worse than student": [f"{_MODEL}.role=student", f"{_MODEL}.slip=0.98"],
    },
    methods=list(MAIN),
    variants=list(VARIANTS),
    ablation=list(ABLATION),
    core=_CORE,
    searched=_CORE[:2],
)


def _residues_teacher(role: str, slip: float) -> list[str]:
    settings = {"role": role, "slip": slip}
    model = {"class_path": "benchmarks.residues.models.ResidueModel", "init_args": settings}
    return [f"--model.teacher.init_args.model={json.dumps(model)}"]


_RESIDUES = [
    Regime("answer only", "good"),
    Regime("whole reasoning", "skips half"),
    Regime("answer only", "skips half"),
    Regime("whole reasoning", "good"),
]
RESIDUES = Task(
    title="sums modulo 3, slip 0.8",
    overlay="benchmarks/residues/task.yaml",
    exact="benchmarks.residues.task.reasoning_reward",
    verifiers={
        "whole reasoning": {
            "class_path": "kdrl_lightning.tiny.ErringVerifier",
            "init_args": {"reward": "benchmarks.residues.task.reasoning_reward"},
        },
        "answer only": {
            "class_path": "kdrl_lightning.tiny.ErringVerifier",
            "init_args": {"reward": "benchmarks.residues.task.answer_reward"},
        },
    },
    teachers={
        "good": _residues_teacher("teacher", 0.0),
        "skips half": _residues_teacher("student", 0.5),
    },
    methods=[
        "GRPO",
        "on-policy distillation",
        "KDRL",
        "RLSD",
        "RLAD α 0.5, offset clamp",
        "RLAD α 0.5",
        "RLAD α 0.8, offset clamp",
    ],
    variants=[],
    ablation=[],
    core=_RESIDUES,
    searched=[],
)
TASKS = {"regimes": ADDITION, "residues": RESIDUES}
