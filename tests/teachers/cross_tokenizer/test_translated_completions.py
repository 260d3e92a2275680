"""Completions that a teacher with another tokenizer sampled, in the student's tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from helpers.short_runs import Trace, fit, make_data, make_module
from helpers.small_tokenizers import by_hand, make
from kdrl_lightning import (
    GRPO,
    ColumnContext,
    CrossTokenizerTeacher,
    LocalTeacher,
    PromptedTeacher,
    RoutedTeacher,
    TeacherPrompt,
    TransformersEngine,
    VLLMTeacherEngine,
)
from kdrl_lightning.engines.base import Completion, Sampling
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.objectives import BehaviorRatio, ShapedProbability
from kdrl_lightning.rollout.groups import GroupShare
from kdrl_lightning.rollout.rollouts import RolloutSource
from kdrl_lightning.rollout_batch import TEACHER
from kdrl_lightning.teachers.cross_tokenizer import TextEncoder, TokenBytes, Translator
from kdrl_lightning.teachers.frozen import FrozenModels
from kdrl_lightning.tiny import TinyModel
from kdrl_lightning.trainer.checks.groups import check_teacher_completions

END = 1
ROW = {"prompt": "1+10="}


def completion(*ids: int, truncated: bool = False) -> Completion:
    return Completion(list(ids), [-float(n + 1) for n in range(len(ids))], truncated)


def test_chunks_share_the_log_probability_of_their_tokens() -> None:
    """``ab|c|ab`` of the teacher becomes letters; and letters become a student's pairs."""
    letters, pairs = by_hand("abc"), by_hand([*"abc", "ab"], [("a", "b")])
    merging, plain = (TokenBytes(t, "x", [END]) for t in (pairs, letters))
    (one,), lost = Translator(merging, plain, [END])([completion(5, 4, 5, END)], [END], 99)
    assert one.ids == [2, 3, 4, 2, 3, END] and not one.truncated and not lost
    assert one.logprobs == [-0.5, -0.5, -2.0, -1.5, -1.5, -4.0]
    (one,), lost = Translator(plain, merging, [END])([completion(2, 3, 4, 2)], [0], 99)
    assert one.ids == [5, 4, 2] and one.logprobs == [-3.0, -3.0, -4.0] and not lost


@pytest.mark.parametrize(
    ("ids", "most", "expected", "cut"),
    [
        ([5, 4, END], 99, [2, 3, 4, 7], False),
        ([END], 99, [7], False),  # nothing but an end
        ([5, 4], 99, [2, 3, 4], False),  # cut by the engine, and whole as far as it goes
        ([5, 6, 4, END], 99, [2, 3], True),  # a character that the student cannot write
        ([6, END], 99, [7], True),
        ([5, 4, END], 3, [2, 3, 4], True),  # longer than the limit in the student's tokens
        ([5, 8, 4], 99, [2, 3], True),  # a special token of the teacher alone
    ],
)
def test_what_does_not_survive_is_cut_and_counted(
    ids: list[int], most: int, expected: list[int], cut: bool
) -> None:
    student, teacher = by_hand("abc"), by_hand([*"abc", "ab", "d"], [("a", "b")])
    for tokenizer, names in (student, ["<x>", "<y>", "<end>"]), (teacher, ["<p>", "<tool>"]):
        tokenizer.add_special_tokens({"additional_special_tokens": names})
    pair = TokenBytes(teacher, "t", [END]), TokenBytes(student, "s", [7])
    (one, same), lost = Translator(*pair, [END])([completion(*ids)] * 2, [7, 7], most)
    assert (one.ids, one.truncated, lost) == (expected, cut, 2 * cut)
    assert len(one.logprobs) == len(one.ids) and same == one


@pytest.mark.parametrize("kinds", [("sentencepiece", "digits"), ("bpe", "metaspace")])
def test_texts_survive_with_half_characters_and_emoji(kinds: tuple[str, str]) -> None:
    teacher, student = (TokenBytes(make(kind), kind, [END]) for kind in kinds)
    encode = TextEncoder(teacher)
    texts = [t.encode() for t in (" 12.5\n👨‍👩‍👧", "שלום e\u0301", "<eos>", "")] + [b"ab\xf0\x9f"]
    sampled = [completion(*ids, END) for ids in encode(texts)]
    made, lost = Translator(teacher, student, [END])(sampled, [END] * len(texts), 99)
    assert not lost
    for text, one, before in zip(texts, made, sampled, strict=True):
        assert one.ids[-1] == END and student.text(one.ids[:-1]) == text
        assert sum(one.logprobs) == pytest.approx(sum(before.logprobs))


@pytest.fixture(scope="module")
def cross(student_folder: str) -> CrossTokenizerTeacher:
    teacher = CrossTokenizerTeacher(LocalTeacher(TinyModel(role="merging_teacher")))
    teacher.check(load_tokenizer(student_folder), student_folder)
    teacher.load(torch.device("cpu"))
    return teacher


def test_each_kind_of_teacher_translates_its_own(
    student_folder: str, teacher_folder: str, cross: CrossTokenizerTeacher
) -> None:
    theirs, student = load_tokenizer(cross.teacher.model_name), load_tokenizer(student_folder)  # type: ignore[arg-type]
    ids = theirs("06,11")["input_ids"]
    expected = student("06,11")["input_ids"]
    assert ids != expected
    routed = RoutedTeacher({"far": cross, "near": LocalTeacher(teacher_folder)})
    rows = [{**ROW, "teacher": "far"}, {**ROW, "teacher": "near"}]
    both = [completion(*ids), completion(*expected)]
    made, lost = routed.in_student_tokens(both, rows, 99)
    assert [one.ids for one in made] == [expected, expected] and lost == 0
    own = theirs(ROW["prompt"])["input_ids"]
    assert [routed.generation_prompt(row, [5]) for row in rows] == [own, [5]]
    frozen = FrozenModels(cross)
    assert frozen.in_student_tokens(both[:1], rows[:1], 3)[0].truncated
    assert (frozen.take_lost(), frozen.take_lost()) == (1, 0)
    assert FrozenModels(None).in_student_tokens(both, rows, 1) == both
    # With its own prompt, it samples after that one.
    prompt = TeacherPrompt(ColumnContext("hint"), "{context},{prompt}")
    inner = PromptedTeacher(LocalTeacher(TinyModel(role="merging_teacher")), prompt)
    hinted = CrossTokenizerTeacher(inner)
    hinted.check(student, student_folder)
    row = {**ROW, "hint": "11"}
    assert hinted.generation_prompt(row, [5]) == theirs("11,1+10=")["input_ids"]
    assert hinted.generates and cross.generates


def test_a_served_teacher_gets_its_own_end_tokens_and_vocabulary(
    cross: CrossTokenizerTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has no weights to read them from: the student's ids would be wrong."""
    student = ModelWeights(SimpleNamespace(config=LlamaConfig(vocab_size=16)), "student")
    module = SimpleNamespace(teacher=cross, weights=lambda: student)
    source: Any = SimpleNamespace(live=SimpleNamespace(module=module))
    engine = VLLMTeacherEngine(["http://127.0.0.1:1"])
    monkeypatch.setattr(VLLMTeacherEngine, "_shortest", lambda self: 128)
    weights = RolloutSource._of_teacher(source, engine)
    size = len(load_tokenizer(cross.teacher.model_name))  # type: ignore[arg-type]
    assert (weights.end_token_ids, weights.vocab_size) == ((END,), size)
    engine.setup(weights, weights.end_token_ids or (), 0)
    assert engine._vocab_size == size > 16
    module.teacher = cross.teacher  # one that has the student's tokens
    assert RolloutSource._of_teacher(source, engine) is student
    module.teacher = None
    assert RolloutSource._of_teacher(source, engine) is student


def test_a_rule_that_divides_by_the_teachers_probabilities_is_refused(
    cross: CrossTokenizerTeacher,
) -> None:
    engine = TransformersEngine()
    share = GroupShare(TEACHER, engine, 1, Sampling(8, 1.0))
    words = r"`teacher_completions` of a teacher with another tokenizer .* got BehaviorRatio\. Use"
    with pytest.raises(ConfigurationError, match=words):
        check_teacher_completions(GRPO(teacher_tokens=BehaviorRatio()), cross, share, engine)
    check_teacher_completions(GRPO(teacher_tokens=ShapedProbability()), cross, share, engine)


@pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
def test_a_run_reads_the_teachers_completions_in_the_students_tokens(
    tmp_path: Path, student_folder: str, cross: CrossTokenizerTeacher
) -> None:
    module, trace = (
        make_module(student_folder, cross, GRPO(teacher_tokens=ShapedProbability())),
        Trace(),
    )
    logged: dict[str, float] = {}
    keep = module.log_step
    module.log_step = lambda values: (logged.update(values), keep(values))[1]  # type: ignore[method-assign]
    data = make_data(
        val_prompts=None, teacher_completions=1, max_tokens=24, minibatches_per_rollout=1,
        prompts_per_rollout=2,
    )  # fmt: skip
    fit(tmp_path, module, data, max_steps=1, callbacks=[trace])
    assert logged["rollout/teacher_reencoded_lost"] == 0.0
    judged = [j for j in data.collector.latest if j.source == TEACHER]
    assert len(judged) == 2
    for one in judged:
        ids = one.completion.ids
        # The teacher is always right, and writes the sums as the student's characters.
        assert one.text.endswith(one.row["answer"]) and len(ids) == len(one.text) + 1
        assert ids[-1] == END and not one.completion.truncated
        assert load_tokenizer(student_folder).decode(ids[:-1]) == one.text
