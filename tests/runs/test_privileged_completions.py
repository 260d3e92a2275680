"""HDPO: the teacher samples after its own prompt, and the student learns it after the student's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import (
    ColumnContext,
    LocalTeacher,
    LoRA,
    PromptedTeacher,
    PublishedHDPO,
    SelfTeacher,
    TeacherPrompt,
    TransformersEngine,
)
from kdrl_lightning.engines import Completion, Sampling
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rewards import Sample
from kdrl_lightning.rollout_batch import STUDENT, TEACHER
from kdrl_lightning.teachers import LiveWeights, MovingAverage
from kdrl_lightning.teachers.own_prompt.groups import as_read
from kdrl_lightning.teachers.self_teachers.rules import WeightRule

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")


class Recorded(TransformersEngine):
    """An engine that keeps the prompts that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        self.asked += prompts
        return super().generate(prompts, seeds, sampling)


def test_completions_after_the_teacher_s_prompt_are_learned_after_the_student_s(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    engine = Recorded()
    prompt = TeacherPrompt(ColumnContext("answer"), "{context}{prompt}")
    teacher = PromptedTeacher(LocalTeacher(teacher_folder), prompt)
    data = make_data(
        val_prompts=None, teacher_completions=1, teacher_engine=engine, reward=lambda sample: 0.0
    )
    module = make_module(student_folder, teacher, PublishedHDPO(top_k=4))
    trace = fit(tmp_path, module, data, max_steps=1)
    ((_, batch),) = trace.seen
    theirs = (batch.source == TEACHER).nonzero().flatten().tolist()
    read = as_read(batch)
    own = [read.input_ids[i, : read.prompt_lengths[i]].tolist() for i in theirs]
    students = [batch.input_ids[i, : batch.prompt_lengths[i]].tolist() for i in theirs]
    assert theirs and all(ids in engine.asked for ids in own)
    for longer, shorter in zip(own, students, strict=True):
        assert longer[-len(shorter) :] == shorter and len(longer) > len(shorter)
        assert shorter not in engine.asked
    assert batch.teacher_topk_ids is not None and batch.has_context.all()


class Followed(Recorded):
    """An engine that keeps one weight of each version that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[tuple[int, float]] = []

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        super().update_weights(weights, version)
        self.got.append((version, float(next(weights.model.parameters()).detach().double().sum())))


def prompted(rule: WeightRule) -> PromptedTeacher:
    prompt = TeacherPrompt(ColumnContext("answer"), "{context}{prompt}")
    return PromptedTeacher(SelfTeacher(rule), prompt)


def odd(sample: Sample) -> float:
    """Half of the prompts are solved by every completion, the others by none."""
    return float(int(sample.row["answer"]) % 2)


@pytest.mark.parametrize("rule", [LiveWeights(), MovingAverage(0.5)])
def test_a_self_teacher_samples_from_its_own_weights_for_failed_prompts(
    tmp_path: Path, student_folder: str, rule: WeightRule
) -> None:
    engine = Followed()
    data = make_data(
        val_prompts=None, teacher_completions=1, teacher_engine=engine, reward=odd, max_tokens=4
    )
    objective = PublishedHDPO(top_k=4, entropy_coef=0.1)  # it moves the student
    module = make_module(student_folder, prompted(rule), objective)
    trace = fit(tmp_path, module, data, max_steps=4)
    for _, batch in trace.seen:
        answers = batch.rewards[batch.source == TEACHER]
        wrong = (batch.rewards == 0) & (batch.source == STUDENT)
        assert not answers.any() and len(answers) == int(wrong.sum()) // 4
    (first, start), (second, later) = engine.got
    assert (first, second) == (0, 2) and start != later


class Second(pl.Callback):
    """Lets every completion of the second rollout be right; notes the teacher's metrics."""

    def __init__(self) -> None:
        self.right = False
        self.seen: list[list[str]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        names = [name for name in trainer.callback_metrics if name.startswith("teacher/")]
        self.seen.append(names)
        self.right = True


def test_a_rollout_without_the_teacher_s_completions_has_none_of_its_metrics(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    """The values of the rollout before would look like this one's."""
    prompt, second = TeacherPrompt(ColumnContext("answer"), "{context}{prompt}"), Second()
    teacher = PromptedTeacher(LocalTeacher(teacher_folder), prompt)
    data = make_data(
        val_prompts=None, teacher_completions=1, reward=lambda sample: float(second.right),
        max_tokens=2, minibatches_per_rollout=1,
    )  # fmt: skip
    module = make_module(student_folder, teacher, PublishedHDPO(top_k=4))
    fit(tmp_path, module, data, [second], max_steps=2)
    assert [len(names) for names in second.seen] == [3, 0]


def test_an_average_of_adapters_does_not_sample(tmp_path: Path, student_folder: str) -> None:
    module = make_module(
        student_folder, prompted(MovingAverage()), PublishedHDPO(top_k=4), lora=LoRA(2)
    )
    data = make_data(val_prompts=None, teacher_completions=1)
    with pytest.raises(ConfigurationError, match="must be 0 for a LoRA student"):
        fit(tmp_path, module, data, max_steps=1)
