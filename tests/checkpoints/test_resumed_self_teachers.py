"""The weights of a self-teacher are state: saved and restored, never trained or exported."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from helpers.resumed_runs import Run, Setting, run, same_batches, same_weights
from helpers.short_runs import Trace, fit, make_data, make_module, make_trainer
from kdrl_lightning import GRPO, KDRL, LoRA, SelfTeacher
from kdrl_lightning.checkpoints.resume import check_kinds
from kdrl_lightning.cli.export import export
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.weights import full_tensor
from kdrl_lightning.teachers import (
    AdapterOffTeacher,
    HardSync,
    InitialWeights,
    LiveWeights,
    LocalTeacher,
    MovingAverage,
    TrustRegion,
)
from kdrl_lightning.teachers.self_teachers import WeightRule, kinds_of_self

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*of the (completions|groups):UserWarning",
        "ignore:Be aware that when using `ckpt_path`:UserWarning",
    ),
    pytest.mark.usefixtures("ends_the_group"),
]
SMALL: dict[str, Any] = {"val_prompts": None, "prompts_per_rollout": 2}


def setting(student: str, rule: WeightRule, lora: bool = False, **trainer: Any) -> Setting:
    return Setting(
        student,
        SelfTeacher(rule),
        lambda: KDRL(0.5),
        SMALL,
        {"max_steps": 4, **trainer},
        lora=(lambda: LoRA(4)) if lora else None,
    )


def kept_of(module: Any) -> dict[str, torch.Tensor]:
    if module.self_teachers is None:
        return {}
    named = module.self_teachers.named_parameters()
    return {name: full_tensor(p.detach()).clone() for name, p in named}


@pytest.mark.parametrize(
    ("rule", "lora", "strategy"),
    [
        (MovingAverage(0.3), False, "auto"),
        (MovingAverage(0.3), True, "fsdp2"),
        (HardSync(2), False, "fsdp2_full"),
    ],
    ids=["average", "LoRA's average in shards", "sync in one file"],
)
def test_n_steps_a_resume_and_n_steps_are_2n_steps(
    tmp_path: Path, student_folder: str, rule: WeightRule, lora: bool, strategy: str
) -> None:
    made = setting(student_folder, rule, lora, strategy=strategy, devices=1)
    whole = run(tmp_path / "whole", made, save="steps")
    kept = kept_of(whole.module)
    student = {n: full_tensor(p.detach()) for n, p in whole.module.student.named_parameters()}
    trained = sum("lora_" in n for n in student) if lora else len(student)
    assert len(kept) == trained
    in_optimizer = {id(p) for g in whole.trainer.optimizers[0].param_groups for p in g["params"]}
    assert not in_optimizer & {id(p) for p in whole.module.self_teachers.parameters()}
    rest = run(tmp_path / "rest", made, whole.checkpoints[3])
    same_batches(whole.seen[3:], rest.seen)
    same_weights(whole.weights(), rest.weights())
    same_weights(kept, kept_of(rest.module))
    checked_without_training(tmp_path, whole, made)


def checked_without_training(tmp_path: Path, whole: Run, made: Setting) -> None:
    """An evaluation reads such a checkpoint without a teacher; an export leaves it out."""
    lora = None if made.lora is None else made.lora()
    module = make_module(made.student, made.teacher, KDRL(0.5), lora=lora)
    trainer = make_trainer(tmp_path, strategy=made.trainer["strategy"], devices=1)
    trainer.validate(module, make_data(), whole.checkpoints[4], verbose=False)
    assert module.self_teachers is None
    same_weights(whole.weights(), dict(module.weights().named_tensors()))
    export(whole.checkpoints[4], str(tmp_path / "out"))
    held = load_file(tmp_path / "out/model.safetensors")
    same_weights({n: t for n, t in whole.weights().items() if n in held}, held)


def test_another_kind_of_teacher_is_refused(tmp_path: Path, student_folder: str) -> None:
    made = setting(student_folder, MovingAverage(0.3), max_steps=1)
    path = run(tmp_path / "whole", made, save="steps").checkpoints[1]
    words = "must be of the checkpoint's kind: got HardSync, .* had MovingAverage\\."
    with pytest.raises(ConfigurationError, match=words):
        run(tmp_path / "rest", setting(student_folder, HardSync()), path, save="never")
    words = r"got no self-teacher, but the run of x had A and B\. Set `model.teacher` to that"
    with pytest.raises(ConfigurationError, match=words):
        check_kinds([], ["A", "B"], "x")
    with pytest.raises(ConfigurationError, match=r"got A, but the run of x had no self-teacher"):
        check_kinds(["A"], [], "x")
    assert kinds_of_self(AdapterOffTeacher()) == ["AdapterOffTeacher"]
    assert kinds_of_self(LocalTeacher(student_folder)) == []
    # Everything that a user can set comes from the configuration.
    faster = setting(student_folder, MovingAverage(0.6), max_steps=2)
    assert run(tmp_path / "rest", faster, path, save="never").trainer.global_step == 2


def test_another_initial_student_is_refused(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    rule = TrustRegion(0.2)
    path = run(tmp_path, setting(student_folder, rule, max_steps=1), save="steps").checkpoints[1]
    assert not any("teacher" in name for name in torch.load(path)["state_dict"])
    same = setting(student_folder, rule, max_steps=2)
    assert run(tmp_path / "rest", same, path, save="never").trainer.global_step == 2
    got, first = re.escape(teacher_folder), re.escape(student_folder)
    words = (
        r"^`student` must be the model that the run started from, which is its teacher: got "
        rf"{got}, with different weights\. It started from {first}\.$"
    )
    with pytest.raises(ConfigurationError, match=words):
        run(tmp_path / "rest", setting(teacher_folder, rule), path, save="never")


# ---- the laws in runs


class Sick(pl.Callback):
    """The second step has a gradient that is not a number; keeps what teachers hold after each."""

    def __init__(self) -> None:
        self.kept: list[dict[str, torch.Tensor]] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 1:
            next(pl_module.student.parameters()).grad.fill_(torch.nan)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.kept.append(kept_of(pl_module))


@pytest.mark.parametrize(
    ("rule", "moves"),
    [(MovingAverage(0.5), [True, False, True, True]), (HardSync(2), [False, False, True, False])],
    ids=["average", "sync"],
)
def test_a_skipped_step_moves_no_teacher(
    tmp_path: Path, student_folder: str, rule: WeightRule, moves: list[bool]
) -> None:
    sick = Sick()
    module = make_module(student_folder, SelfTeacher(rule), KDRL(0.5))
    fit(tmp_path, module, make_data(**SMALL), [sick], max_steps=4)
    assert module.skipped_steps == 1
    start = load_file(f"{student_folder}/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    steps = [start[name], *(kept[f"0.model.{name}"] for kept in sick.kept)]
    assert [not torch.equal(a, b) for a, b in pairwise(steps)] == moves


class SamePrompt(SelfTeacher):
    """As after a separate prompt with an empty context."""

    has_own_prompt = True


def grpo_and(
    tmp_path: Path, student: str, objective: GRPO | KDRL, teacher: Any, **trainer: Any
) -> Trace:
    module = make_module(student, teacher, objective)
    data = make_data(**SMALL, minibatches_per_rollout=1)
    trace = fit(tmp_path, module, data, max_steps=3, accumulate_grad_batches=2, **trainer)
    trace.weights = dict(module.weights().named_tensors())  # type: ignore[attr-defined]
    return trace


def test_behind_the_same_prompt_the_current_student_adds_nothing(
    tmp_path: Path, student_folder: str
) -> None:
    alone: Any = grpo_and(tmp_path, student_folder, GRPO(), None)
    live = SamePrompt(LiveWeights())
    both: Any = grpo_and(tmp_path, student_folder, KDRL(0.5), live)
    for _, batch in both.seen:
        assert torch.equal(batch.teacher_logprobs, batch.old_logprobs)
    same_weights(alone.weights, both.weights)


def test_a_second_model_computes_in_the_type_of_the_student(
    tmp_path: Path, student_folder: str
) -> None:
    """A copy of the current student gives its numbers, also those of bfloat16 in shards."""
    objective, live = KDRL(0.5), SamePrompt(MovingAverage(1.0))
    trainer = {"strategy": "fsdp2", "devices": 1, "precision": "bf16-mixed"}
    trace = grpo_and(tmp_path, student_folder, objective, live, **trainer)
    for _, batch in trace.seen:
        assert torch.equal(batch.teacher_logprobs, batch.old_logprobs)


def test_behind_the_same_prompt_the_initial_student_is_the_reference(
    tmp_path: Path, student_folder: str
) -> None:
    objective = KDRL(0.5, ref_kl_coef=0.1)
    trace = grpo_and(tmp_path, student_folder, objective, SelfTeacher(InitialWeights()))
    for step, batch in trace.seen:
        assert torch.equal(batch.teacher_logprobs, batch.ref_logprobs)
        assert torch.equal(batch.teacher_logprobs, batch.old_logprobs) == (step == 0)
