"""Runs whose teacher has its own prompt: resumed within a rollout, and refused before it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from helpers.resumed_runs import Setting, run, same_batches, same_weights
from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import (
    KDRL,
    ColumnContext,
    FeedbackContext,
    JoinedContext,
    LocalTeacher,
    OtherProblemContext,
    PromptedTeacher,
    SiblingContext,
    TeacherPrompt,
)
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.rewards import Sample, Verdict
from kdrl_lightning.tiny import ColumnAddition
from kdrl_lightning.tiny.addition import READING

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*of the (completions|groups):UserWarning",
        "ignore:The number of training batches:UserWarning",
    ),
]


def test_resumed_within_a_rollout_the_teacher_reads_the_same_prompts(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    """The updates run the teacher, so that the saved rollout must have what it reads."""
    teacher = PromptedTeacher(
        LocalTeacher(teacher_folder), TeacherPrompt(SiblingContext(), READING)
    )
    setting = Setting(
        student_folder,
        teacher,
        lambda: KDRL(0.5, kl_estimator="full_vocabulary"),
        {"val_prompts": None},
        {"max_steps": 3, "accumulate_grad_batches": 2},
    )
    whole = run(tmp_path / "whole", setting, save="steps")
    rest = run(tmp_path / "rest", setting, whole.checkpoints[1])
    same_batches(whole.seen[2:], rest.seen)
    same_weights(whole.weights(), rest.weights())

    tokenizer = load_tokenizer(student_folder)
    groups: dict[Any, list[Any]] = defaultdict(list)
    for step, batch in whole.seen:
        assert batch.teacher_logprobs is not None
        assert not (batch.imitation_mask & ~batch.has_context[:, None]).any()
        for row in range(len(batch)):
            ids = batch.teacher_prompt_ids[row]
            end = int(batch.completion_lengths[row]) - (not batch.truncated[row])
            groups[step, int(batch.group_ids[row])].append(
                (
                    # What rewards and contexts read has no padding, which a random model samples.
                    tokenizer.decode(batch.completion_ids[row, :end]).replace("<pad>", ""),
                    float(batch.rewards[row]),
                    bool(batch.has_context[row]),
                    tokenizer.decode(ids[ids >= 0]),
                    tokenizer.decode(batch.input_ids[row, : batch.prompt_lengths[row]]),
                )
            )
    assert all(len(group) == 4 for group in groups.values())
    seen = [0, 0]
    for group in groups.values():
        for place, (_, _, has_context, shown, prompt) in enumerate(group):
            others = [t for i, (t, reward, *_) in enumerate(group) if i != place and reward and t]
            seen[has_context] += 1
            assert has_context == bool(others)
            assert shown in ([f"{text}#{prompt}" for text in others] or [prompt])
    assert all(seen)
    fractions = [row["kd/context_frac"] for row in whole.rows]
    first = [row for step, batch in whole.seen if step < 2 for row in batch.has_context.tolist()]
    assert fractions[0] == pytest.approx(sum(first) / len(first))
    assert whole.rows[0]["kd/context_dropped_frac"] == 0.0


def test_a_control_shows_another_problems_solution(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    context = OtherProblemContext(ColumnContext("solution"))
    teacher = PromptedTeacher(LocalTeacher(teacher_folder), TeacherPrompt(context, READING))
    prompts = ColumnAddition(8, seed=1, solutions=True)
    data = make_data(train_prompts=prompts, val_prompts=None, minibatches_per_rollout=1)
    trace = fit(tmp_path, make_module(student_folder, teacher, KDRL(0.5)), data, max_steps=2)
    tokenizer = load_tokenizer(student_folder)
    solutions = {row["prompt"]: row["solution"] for row in prompts}
    pairs = set()
    for _, batch in trace.seen:
        assert batch.has_context.all()
        for row in range(len(batch)):
            ids = batch.teacher_prompt_ids[row]
            shown = tokenizer.decode(ids[ids >= 0])
            solution, prompt = shown[: shown.rindex("#")], shown[shown.rindex("#") + 1 :]
            assert solution in solutions.values() and solution != solutions[prompt]
            pairs.add((prompt, solution))
    assert len(pairs) == 8  # one for each problem


def says_nothing(sample: Sample) -> Verdict:
    return Verdict(float(len(sample.ids) % 2), False)


def says_something(sample: Sample) -> Verdict:
    return Verdict(float(len(sample.ids) % 2), False, feedback=f"{len(sample.ids)}")


SOLVED = ColumnAddition(8, seed=1, solutions=True)
SEEN = [{**row, "prompt": f"{row['solution']}#{row['prompt']}"} for row in SOLVED]
SIBLINGS = JoinedContext({"1": SiblingContext()})


@pytest.mark.parametrize(
    ("prompt", "data", "words"),
    [
        (
            TeacherPrompt(ColumnContext("way")),
            {},
            r"column `way` must have text .* got none in 8 ch",
        ),
        (
            TeacherPrompt(ColumnContext("way")),
            {"train_prompts": [{**row, "way": ""} for row in SOLVED]},
            r"column `way` must have text .* got none in 8 checked rows with the columns answer, p",
        ),
        (
            TeacherPrompt(ColumnContext("solution")),
            {"train_prompts": [{**row, "solution": [1]} for row in SOLVED]},
            r"row 0 of `train_prompts`: the column `solution` must hold text .*: got \[1\]",
        ),
        (
            TeacherPrompt(ColumnContext("solution")),
            {"train_prompts": SEEN},
            r"must not be in the student's prompt already: got '.*' in it, as in all 8 checked",
        ),
        (
            TeacherPrompt(ColumnContext("solution"), max_tokens=9),
            {},
            r"`max_tokens` of the teacher's prompt must be at least the shortest prompt: got 9, be",
        ),
        (TeacherPrompt(SIBLINGS), {"group_size": 1}, r"`group_size` must be at least 2 for a Sibl"),
        (
            TeacherPrompt(FeedbackContext()),
            {"reward": says_nothing},
            r"`reward` must return feedback for a FeedbackContext: got none for an empty completi",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(
    tmp_path: Path, student_folder: str, teacher_folder: str, prompt: Any, data: Any, words: str
) -> None:
    teacher = PromptedTeacher(LocalTeacher(teacher_folder), prompt)
    changed = make_data(**{"train_prompts": SOLVED, "val_prompts": None, **data})
    module = make_module(student_folder, teacher, KDRL(0.5, scale_by_std=False))
    if data.get("group_size") == 1:
        from kdrl_lightning import OnPolicyDistillation

        module.objective = OnPolicyDistillation()
    with pytest.raises(ConfigurationError, match=words) as error:
        fit(tmp_path, module, changed)
    assert "\n" not in str(error.value) and module.student is None


def test_feedback_and_rows_without_a_context(
    tmp_path: Path, student_folder: str, teacher_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "solution": row["solution"] if i % 2 else ""} for i, row in enumerate(SOLVED)]
    context = JoinedContext({"": ColumnContext("solution"), "#": FeedbackContext()})
    teacher = PromptedTeacher(LocalTeacher(teacher_folder), TeacherPrompt(context, READING))
    data = make_data(train_prompts=rows, val_prompts=None, reward=says_something)
    trace = fit(tmp_path, make_module(student_folder, teacher, KDRL(0.5)), data, max_steps=1)
    assert all(batch.has_context.all() for _, batch in trace.seen)
    assert "not imitated" not in capsys.readouterr().out
    alone = PromptedTeacher(
        LocalTeacher(teacher_folder), TeacherPrompt(ColumnContext("solution"), READING)
    )
    data = make_data(train_prompts=rows, val_prompts=None)
    fit(tmp_path, make_module(student_folder, alone, KDRL(0.5)), data, max_steps=1)
    assert (
        "train_prompts: the teacher has no context for 4 of 8 checked prompts (4 without one, 0 "
        "above 128 tokens), which are not imitated" in capsys.readouterr().out
    )
