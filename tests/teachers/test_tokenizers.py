"""Student and teacher: tokens by content, padding rows, end tokens, chat templates."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import GKD, KDRL, LocalTeacher
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.losses.logprobs import Head
from kdrl_lightning.models.loading import load_causal_lm, load_tokenizer
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.objectives import SFT, Objective, SampledKL, ShapedProbability, VocabularyKL
from kdrl_lightning.objectives.grpo import GRPO
from kdrl_lightning.objectives.selections import ExceptEndToken
from kdrl_lightning.rollout_batch import TEACHER, RolloutBatch, collate
from kdrl_lightning.teachers import CachedTeacher, RoutedTeacher
from kdrl_lightning.teachers.tokenizers import (
    check_end_tokens,
    check_same_vocabulary,
    different_ends,
    warn_of_templates,
)

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

CPU = torch.device("cpu")
BASE = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}
EOS, HASH = 1, 15  # of the embedded tokenizer; the chat teacher ends with "#"
SIMPLE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


class Vocabulary:
    """What the checks read of a tokenizer."""

    def __init__(self, tokens: dict[str, int], eos: int = 1) -> None:
        self.tokens = tokens
        self.eos_token_id = eos

    def get_vocab(self) -> dict[str, int]:
        return self.tokens


def check(teacher: dict[str, int], student: dict[str, int] = BASE) -> None:
    ours, theirs = Vocabulary(student), Vocabulary(teacher)
    check_same_vocabulary(ours, theirs, "the/student", "the/teacher")


def refused(found: str, teacher: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check(teacher)
    assert str(caught.value) == (
        f"student and teacher must share one vocabulary: got {found} "
        "(student the/student, teacher the/teacher). Choose a teacher of the same family."
    )


@pytest.mark.parametrize("teacher", [dict(BASE), dict(reversed(BASE.items()))])
def test_the_same_vocabulary_is_accepted(teacher: dict[str, int]) -> None:
    check(teacher)


def test_tokens_that_only_the_teacher_has_are_a_warning() -> None:
    with pytest.warns(UserWarning) as caught:
        check({**BASE, "<think>": 4, "<more>": 9})
    assert str(caught[0].message).startswith(
        "the teacher the/teacher has 2 tokens that the student the/student does not know, first 4: "
        "'<think>'."
    )


def test_another_token_at_an_id_is_named() -> None:
    refused("1 ids differ, first 3: 'b' against 'c'", {"<pad>": 0, "<eos>": 1, "a": 2, "c": 3})


def test_the_first_of_many_differences_is_named() -> None:
    refused("2 ids differ, first 2: 'a' against 'b'", {"<pad>": 0, "<eos>": 1, "b": 2, "a": 3})


def test_tokens_that_only_the_student_has_are_named() -> None:
    refused("2 ids that only the student has, first 2: 'a'", {"<pad>": 0, "<eos>": 1})


def test_a_token_that_moved_behind_the_end_is_refused() -> None:
    found = "1 ids that only the student has, first 3: 'b'"
    refused(found, {"<pad>": 0, "<eos>": 1, "a": 2, "b": 7})


def test_real_tokenizers_of_one_family_agree(student_folder: str, teacher_folder: str) -> None:
    ours, theirs = load_tokenizer(student_folder), load_tokenizer(teacher_folder)
    check_same_vocabulary(ours, theirs, student_folder, teacher_folder)
    assert different_ends(ours, theirs, 16) is None
    warn_of_templates(ours, theirs, student_folder, teacher_folder)


def test_a_token_added_to_one_of_the_two(student_folder: str, teacher_folder: str) -> None:
    ours, theirs = load_tokenizer(student_folder), load_tokenizer(teacher_folder)
    ours.add_tokens(["<think>"])
    with pytest.raises(
        ConfigurationError, match=r"1 ids that only the student has.* 16: '<think>'"
    ):
        check_same_vocabulary(ours, theirs, student_folder, teacher_folder)
    with pytest.warns(UserWarning, match=r"has 1 tokens .* first 16: '<think>'"):
        check_same_vocabulary(theirs, ours, teacher_folder, student_folder)


# Padding rows: the same tokens, embeddings of different heights.


def padded(folder: str, to: Path, rows: int, seed: int = 0) -> str:
    """Copy a model with rows after its last token, some of which it likes a lot."""
    model = load_causal_lm(folder)
    torch.manual_seed(seed)
    with torch.random.fork_rng():
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[16:] = 3 * model.get_output_embeddings().weight[9]
    model.save_pretrained(to)
    load_tokenizer(folder).save_pretrained(to)
    return str(to)


def ready(teacher: LocalTeacher, student: str) -> LocalTeacher:
    teacher.check(load_tokenizer(student), student)
    teacher.load(CPU)
    return teacher


@pytest.fixture
def batch() -> RolloutBatch:
    return collate([[5, 6, 7], [8]], [[9, EOS], [4, HASH, 4, EOS]], [0, 1], pad_id=0)


def test_a_taller_teacher_is_cut_to_the_students_rows(
    student_folder: str, teacher_folder: str, batch: RolloutBatch, tmp_path: Path
) -> None:
    tall = ready(LocalTeacher(padded(teacher_folder, tmp_path, 32)), student_folder)
    plain = ready(LocalTeacher(teacher_folder), student_folder)
    torch.testing.assert_close(tall.score(batch).logprobs, plain.score(batch).logprobs)
    logits = [t.states(batch).head.logits(t.states(batch).hidden) for t in (tall, plain)]
    torch.testing.assert_close(*logits)


def test_a_taller_student_is_compared_on_the_teachers_rows(
    student_folder: str, teacher_folder: str, batch: RolloutBatch, tmp_path: Path
) -> None:
    path = padded(student_folder, tmp_path, 32)
    teacher = ready(LocalTeacher(teacher_folder), path)
    plain = ready(LocalTeacher(teacher_folder), student_folder)
    assert torch.equal(teacher.score(batch).logprobs, plain.score(batch).logprobs)

    def reverse_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape == b.shape
        return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)

    gaps = [
        Scorer(load_causal_lm(folder)).score(
            batch, other=teacher.states(batch), divergence=reverse_kl
        )
        for folder in (path, student_folder)
    ]
    torch.testing.assert_close(gaps[0].divergence, gaps[1].divergence)


def test_padding_rows_that_the_teacher_lacks_are_refused_once_sampled(
    student_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    teacher = ready(LocalTeacher(teacher_folder), padded(student_folder, tmp_path, 32))
    for reads in (teacher.accept, teacher.score, teacher.states):
        with pytest.raises(TrainingStopped, match=r"below 16, .*head: got 20, a padding row"):
            reads(collate([[5]], [[20, EOS]], [0], pad_id=0))


def test_a_taller_teacher_samples_the_students_tokens_only(
    student_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    tall = LocalTeacher(padded(teacher_folder, tmp_path / "tall", 32))
    module = make_module(student_folder, tall, GKD())
    trace = fit(tmp_path, module, make_data(teacher_completions=2, val_prompts=None), max_steps=1)
    whole = trace.seen[0][1]
    theirs = whole.select((whole.source == TEACHER).nonzero().squeeze(-1))
    assert len(theirs) == 4 and int(theirs.completion_ids.max()) < 16
    with pytest.raises(TrainingStopped, match=r"must be below 16, .* student's embedding: got 20"):
        tall.accept(collate([[5]], [[20, EOS]], [0], pad_id=0))


# End tokens.


@pytest.fixture(scope="module")
def chat_teacher(teacher_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teacher with `#` as its end token."""
    folder = tmp_path_factory.mktemp("chat") / "teacher"
    shutil.copytree(teacher_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "#"}))
    return str(folder)


def test_end_tokens_are_named_by_content() -> None:
    tokens = {"<|endoftext|>": 0, "<|im_end|>": 1}
    ends = different_ends(Vocabulary(tokens, 0), Vocabulary(tokens, 1), 2)
    assert ends == "'<|endoftext|>' (0) and '<|im_end|>' (1)"


def test_a_teachers_end_token_behind_the_students_rows_is_refused() -> None:
    ours, theirs = Vocabulary(BASE), Vocabulary({**BASE, "<end>": 4}, 4)
    words = r"below 4, the rows of .*: got '<eos>' \(1\) and '<end>' \(4\)\. Choose a teacher"
    with pytest.raises(ConfigurationError, match=words):
        different_ends(ours, theirs, 4)


@pytest.mark.parametrize(
    "objective",
    [
        KDRL(selection=[ExceptEndToken()]),
        KDRL(distill=SampledKL(), selection=[ExceptEndToken()]),
        SFT(),  # does not read the teacher's scores
        GRPO(),
    ],
)
def test_what_does_not_read_the_teacher_at_the_end_takes_any_end(objective: Objective) -> None:
    check_end_tokens("a and b", objective)


@pytest.mark.parametrize(
    "distill", [VocabularyKL(1.0), VocabularyKL(1.0, top_k=3)], ids=["all", "top-k"]
)
def test_whole_distributions_have_the_end_at_every_position(distill: VocabularyKL) -> None:
    """Where the teacher would end and the student did not, no selection leaves its end out."""
    objective = KDRL(distill=distill, selection=[ExceptEndToken()])
    words = "which swaps the two tokens in its scores, because the objective compares the end"
    with pytest.raises(ConfigurationError, match=words):
        check_end_tokens("a and b", objective)
    check_end_tokens(None, objective)


def test_teachers_around_another_tell_of_its_end(
    student_folder: str, teacher_folder: str, chat_teacher: str, tmp_path: Path
) -> None:
    same, other = LocalTeacher(teacher_folder), LocalTeacher(chat_teacher)
    around = [
        CachedTeacher(other, str(tmp_path / "scores")),
        RoutedTeacher({"a": same, "b": other}),
        RoutedTeacher({"a": same}),
    ]
    for teacher in around:
        teacher.check(load_tokenizer(student_folder), student_folder)
    assert [t.other_end for t in around] == ["'<eos>' (1) and '#' (15)"] * 2 + [None]


def test_another_end_token_is_refused_in_setup_with_both_cures(
    student_folder: str, chat_teacher: str, tmp_path: Path
) -> None:
    teacher = LocalTeacher(chat_teacher)
    with pytest.raises(ConfigurationError) as caught:
        fit(tmp_path, make_module(student_folder, teacher, KDRL()), make_data())
    assert str(caught.value) == (
        "student and teacher must end with the same token: got '<eos>' (1) and '#' (15). Set "
        "`translate_end_token: true` of a LocalTeacher, which swaps the two tokens in its scores, "
        "or leave end tokens out of the teacher's term with the selection ExceptEndToken."
    )


def test_a_translated_end_is_the_teachers_own(
    student_folder: str, chat_teacher: str, batch: RolloutBatch
) -> None:
    teacher = ready(LocalTeacher(chat_teacher, translate_end_token=True), student_folder)
    assert teacher.other_end is None
    plain = ready(LocalTeacher(chat_teacher), student_folder)
    assert teacher.fingerprint() != plain.fingerprint()
    # What it says of the student's end is what it says of its own, and the other way round.
    own = batch.completion_ids.clone()
    own[batch.completion_ids == EOS], own[batch.completion_ids == HASH] = HASH, EOS
    asked = batch.completion_ids[..., None]
    got = teacher.score(batch, topk_ids=asked)
    # Only the sampled ids are renamed: what the model reads stays.
    expected = plain.score(batch.replace(completion_ids=own), topk_ids=own[..., None])
    torch.testing.assert_close(got.logprobs, expected.logprobs)
    torch.testing.assert_close(got.topk_logprobs, expected.topk_logprobs)
    torch.testing.assert_close(got.entropy, expected.entropy)
    got, best = teacher.score(batch), plain.score(batch).topk_ids  # another way to compute it
    torch.testing.assert_close(got.logprobs, expected.logprobs)
    swapped = torch.where(best == EOS, HASH, torch.where(best == HASH, EOS, best))
    assert torch.equal(got.topk_ids, torch.where(batch.completion_mask[..., None], swapped, 0))
    whole = [t.states(batch).head.logits(t.states(batch).hidden) for t in (teacher, plain)]
    order = torch.arange(16)
    order[EOS], order[HASH] = HASH, EOS
    torch.testing.assert_close(whole[0], whole[1][:, order])
    assert not torch.equal(whole[0], whole[1])


def test_a_swap_leaves_gradients_where_they_belong() -> None:
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, 3, dtype=torch.float64)
    Head(weight, swap=(1, 4)).logits(hidden)[:, 1].sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad.abs().sum(1) > 0, torch.tensor([False] * 4 + [True]))


@pytest.mark.parametrize("translate", [True, False])
def test_a_chat_teachers_completions_end_as_the_student_has_to(
    student_folder: str, chat_teacher: str, tmp_path: Path, translate: bool
) -> None:
    teacher = LocalTeacher(chat_teacher, translate_end_token=translate)
    sampled = KDRL(teacher_tokens=ShapedProbability(), selection=[ExceptEndToken()])
    objective = GKD() if translate else sampled
    data = make_data(teacher_completions=4, max_tokens=24)
    trace = fit(tmp_path, make_module(student_folder, teacher, objective), data, max_steps=1)
    whole = trace.seen[0][1]
    theirs = whole.select(((whole.source == TEACHER) & ~whole.truncated).nonzero().squeeze(-1))
    assert len(theirs)
    last = theirs.completion_mask.sum(1) - 1
    ends = theirs.completion_ids == EOS
    assert torch.equal(ends.nonzero()[:, 1], last) and HASH not in theirs.completion_ids
    # It stopped with its own end, or at the student's: with the probability of one of the two.
    asked = torch.tensor([EOS, HASH]).expand(*ends.shape, 2)
    either = teacher.score(theirs, topk_ids=asked).topk_logprobs[ends]
    gaps = (either - theirs.rollout_logprobs[ends][:, None]).abs()
    assert bool((gaps.min(1).values < 1e-5).all())
    own = gaps.argmin(1) == (0 if translate else 1)
    assert own.any() and not own.all()
    before = theirs.completion_mask & ~ends
    torch.testing.assert_close(theirs.rollout_logprobs[before], theirs.teacher_logprobs[before])
    at_end = whole.completion_mask.sum(1) - 1
    imitated = whole.imitation_mask[torch.arange(len(whole)), at_end]
    sampled = whole.truncated & (whole.source != TEACHER)  # KDRL's estimate is on the student's
    assert torch.equal(imitated, torch.full_like(imitated, True) if translate else sampled)


def test_an_evaluated_teacher_stops_at_its_own_end(
    student_folder: str, chat_teacher: str, tmp_path: Path
) -> None:
    ended: list[bool] = []

    def reward(sample: Any) -> float:
        ended.append(not sample.truncated and HASH not in sample.ids)
        return float(len(sample.ids) % 2)

    teacher = LocalTeacher(chat_teacher, translate_end_token=True)
    module = make_module(student_folder, teacher, KDRL())
    data = make_data(reward=reward, max_tokens=24)
    fit(tmp_path, module, data, max_steps=1)
    ended.clear()
    data.evaluate(teacher.weights())
    assert any(ended)


# Chat templates.


class Chat(Vocabulary):
    """A tokenizer with a template."""

    def __init__(self, template: str | None) -> None:
        super().__init__(BASE)
        self.chat_template = template

    def apply_chat_template(self, messages: Any, **settings: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        assert settings == {"add_generation_prompt": True, "tokenize": False}
        rendered, _ = render_jinja_template(
            [messages], chat_template=self.chat_template, add_generation_prompt=True
        )
        return str(rendered[0])


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize(
    ("student", "teacher"),
    [(None, None), (SIMPLE, SIMPLE), (SIMPLE, SIMPLE + "{# the same in other words #}")],
)
def test_templates_that_render_alike_are_silent(student: str | None, teacher: str | None) -> None:
    warn_of_templates(Chat(student), Chat(teacher), "s", "t")


@pytest.mark.parametrize(
    ("teacher", "found"),
    [
        (SIMPLE + "[think]", "10 of 1 rendered messages: '[user]1+1=' against '[user]1+1=[think]'"),
        (
            "{% if messages[0].role != 'system' %}[system]You are a teacher.{% endif %}" + SIMPLE,
            "1 of 1 rendered messages: '[user]1+1=' against '[system]You are a teacher...'",
        ),
        (
            SIMPLE.replace("[{{ m.role }}]", "{{ '[user]' if m.role == 'user' else '' }}"),
            "0 of 2 rendered messages: '[system]Think.[user]1+1=' against 'Think.[user]1+1='",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            + SIMPLE,
            "0 of 2 rendered messages: '[system]Think.[user]1+1=' against '<refused: no system>'",
        ),
        (None, "0 of 1 rendered messages: '[user]1+1=' against '<no template>'"),
    ],
)
def test_another_template_is_a_warning_that_shows_the_first_difference(
    teacher: str | None, found: str
) -> None:
    with pytest.warns(UserWarning) as caught:
        warn_of_templates(Chat(SIMPLE), Chat(teacher), "the/student", "the/teacher")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(
        "the chat templates of student the/student and teacher the/teacher differ, first at "
        f"character {found}. The teacher scores prompts as the student's template renders them. "
    )


def test_a_local_teacher_compares_the_templates(
    student_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    path = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (path / "chat_template.jinja").write_text(SIMPLE)
    with pytest.warns(UserWarning, match=r"templates .* '<no template>' against '\[user\]"):
        LocalTeacher(str(path)).check(load_tokenizer(student_folder), student_folder)
