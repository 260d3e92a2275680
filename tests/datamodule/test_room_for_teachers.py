"""Limits on the teacher's completions are counted in the tokens that the teacher reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import (
    GRPO,
    ColumnContext,
    CrossTokenizerTeacher,
    LocalTeacher,
    PromptedTeacher,
    TeacherPrompt,
    TransformersEngine,
)
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.objectives import ShapedProbability
from kdrl_lightning.tiny import TinyModel

ROWS = [{"prompt": "10+11=", "answer": "21", "hint": "9" * n} for n in (3, 30)]
MOST = 10  # tokens of a completion


class PreparedError(Exception):
    pass


class Noting(TransformersEngine):
    """Ends the run once it knows its longest sequence."""

    def prepare(self, path: str, longest: int, device: torch.device) -> None:
        raise PreparedError(longest)


def longest(folder: Path, student: str, teacher: Any, rows: Any = ROWS, most: int = MOST) -> int:
    data = make_data(
        train_prompts=rows, val_prompts=None, prompts_per_rollout=2, max_tokens=most,
        teacher_completions=1, teacher_engine=Noting(),
    )  # fmt: skip
    module = make_module(student, teacher, GRPO(teacher_tokens=ShapedProbability()))
    with pytest.raises(PreparedError) as found:
        fit(folder, module, data, max_steps=2)
    return int(found.value.args[0])


def hinted(teacher: Any, **settings: Any) -> PromptedTeacher:
    prompt = TeacherPrompt(ColumnContext("hint"), "{context},{prompt}", **settings)
    return PromptedTeacher(teacher, prompt)


def test_the_engine_is_made_for_the_teachers_own_prompts(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    """With the student's 6 tokens vLLM's ``max_model_len`` would be too short for the hints."""
    plain = LocalTeacher(teacher_folder)
    assert longest(tmp_path, student_folder, plain) == 6 + MOST
    assert longest(tmp_path, student_folder, hinted(plain)) == 30 + 1 + 6 + MOST
    merging = TinyModel(role="merging_teacher")
    cross = CrossTokenizerTeacher(LocalTeacher(merging))
    own = load_tokenizer(merging.path())
    count = len(own("10+11=")["input_ids"])
    assert count < 6 and longest(tmp_path, student_folder, cross) == count + MOST
    both = CrossTokenizerTeacher(hinted(LocalTeacher(merging)))
    count = len(own("9" * 30 + ",10+11=")["input_ids"])
    assert longest(tmp_path, student_folder, both) == count + MOST


def test_of_unread_rows_only_the_context_is_known(
    tmp_path: Path, student_folder: str, teacher_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdrl_lightning.datamodule.rollouts.CHECKED_ROWS", 0)
    teacher = LocalTeacher(teacher_folder)
    rows = [ROWS[0], *ROWS]
    assert longest(tmp_path, student_folder, hinted(teacher), rows) == teacher.context_length


def test_a_prompt_that_leaves_no_room_for_the_teachers_completion_is_refused(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    """In one line, before anything is sampled."""
    context = LocalTeacher(teacher_folder).context_length
    most = context - 30
    words = rf"row 1 of `train_prompts`.* at most 30 tokens \(the teacher's context {context}, "
    with pytest.raises(ConfigurationError, match=words + rf"`max_tokens` {most}\): got 37\. Lower"):
        longest(tmp_path, student_folder, hinted(LocalTeacher(teacher_folder)), most=most)


def test_a_teacher_with_a_shorter_context_limits_the_students_prompts(
    tmp_path: Path, student_folder: str, teacher_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalTeacher, "context_length", 15)
    words = r"at most 5 tokens a prompt \(the teacher's context 15, `max_tokens` 10\): got 6 in row"
    with pytest.raises(ConfigurationError, match=words):
        longest(tmp_path, student_folder, LocalTeacher(teacher_folder))
