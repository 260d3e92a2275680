"""The frozen teacher in this process against the scorer of the same folder."""

from __future__ import annotations

import pytest
import torch

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import ModelSource, load_causal_lm, load_tokenizer
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers import LocalTeacher

CPU = torch.device("cpu")


@pytest.fixture
def batch() -> RolloutBatch:
    return collate([[5, 6, 7], [8]], [[9, 1], [4, 4, 4, 1]], [0, 1], pad_id=0).replace(
        temperature=0.7
    )


@pytest.fixture
def teacher(teacher_folder: str) -> LocalTeacher:
    made = LocalTeacher(teacher_folder)
    made.load(CPU)
    return made


def test_scores_are_the_models_at_the_sampling_temperature(teacher, teacher_folder, batch):
    with torch.no_grad():
        expected = Scorer(load_causal_lm(teacher_folder)).score(batch).logprobs
    torch.testing.assert_close(teacher.score(batch).logprobs, expected, atol=1e-6, rtol=1e-6)
    assert not teacher.score(batch).logprobs[~batch.completion_mask].any()


def test_a_teacher_is_frozen(teacher, batch):
    model = teacher.weights().model
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert not teacher.score(batch).logprobs.requires_grad


def test_a_teacher_is_loaded_once(teacher):
    model = teacher.weights().model
    teacher.load(CPU)
    assert teacher.weights().model is model


def test_weights_are_in_the_asked_type(teacher_folder):
    teacher = LocalTeacher(teacher_folder, dtype="bfloat16")
    teacher.load(CPU)
    assert {p.dtype for p in teacher.weights().model.parameters()} == {torch.bfloat16}


def test_the_same_vocabulary_is_accepted(teacher, student_folder):
    teacher.check(load_tokenizer(student_folder), student_folder)


def test_another_vocabulary_is_refused(teacher, student_folder):
    tokenizer = load_tokenizer(student_folder)
    tokenizer.add_tokens(["<think>"])
    with pytest.raises(ConfigurationError, match="student and teacher must share one vocabulary"):
        teacher.check(tokenizer, student_folder)


def test_rows_behind_the_students_vocabulary_do_not_count(
    teacher_folder, student_folder, batch, tmp_path
):
    model = load_causal_lm(teacher_folder)
    expected = Scorer(model).score(batch).logprobs.detach()
    model.resize_token_embeddings(32, mean_resizing=False)
    model.save_pretrained(tmp_path)
    load_tokenizer(teacher_folder).save_pretrained(tmp_path)
    padded = LocalTeacher(str(tmp_path))
    padded.check(load_tokenizer(student_folder), student_folder)
    padded.load(CPU)
    torch.testing.assert_close(padded.score(batch).logprobs, expected, atol=1e-6, rtol=1e-6)


def test_a_model_source_is_made_in_prepare(teacher_folder):
    calls = []

    class Source(ModelSource):
        def path(self) -> str:
            calls.append(1)
            return teacher_folder

    teacher = LocalTeacher(Source())
    assert calls == []
    teacher.prepare()
    assert calls == [1]
    teacher.load(CPU)
    assert teacher.weights().path == teacher_folder


@pytest.mark.parametrize("use", [lambda t, b: t.score(b), lambda t, b: t.weights()])
def test_a_teacher_that_is_not_loaded_says_so(teacher_folder, batch, use):
    with pytest.raises(RuntimeError, match=r"^the teacher is not loaded: call load\(\) first$"):
        use(LocalTeacher(teacher_folder), batch)


def test_a_teacher_joins_micro_batches_where_it_shares_prompts(teacher, teacher_folder):
    assert teacher.joins
    whole_rows = LocalTeacher(teacher_folder, dtype="float64")  # runs no prompt for several rows
    whole_rows.load(CPU)
    assert not whole_rows.joins
