"""A teacher samples after its own prompt; the student learns that after its own: HDPO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import (
    ColumnContext,
    LocalTeacher,
    PromptedTeacher,
    PublishedHDPO,
    TeacherPrompt,
    TransformersEngine,
)
from kdrl_lightning.engines import Completion, Sampling
from kdrl_lightning.rollout_batch import TEACHER
from kdrl_lightning.teachers.own_prompt.groups import as_read

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
    data = make_data(val_prompts=None, teacher_completions=1, teacher_engine=engine)
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
