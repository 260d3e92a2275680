"""A teacher with its own prompt: the same completions, read after another prompt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.reference import close
from kdrl_lightning.engines.base import Completion
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.losses import reverse_kl
from kdrl_lightning.losses.logprobs import TokenScores
from kdrl_lightning.models.loading import load_causal_lm, load_tokenizer
from kdrl_lightning.models.lora import LoRA
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.rewards.base import Verdict
from kdrl_lightning.rollout.updates.scoring import _by_prompt, joined
from kdrl_lightning.rollout_batch import RolloutBatch, collate, pad_rows
from kdrl_lightning.teachers import (
    AdapterOffTeacher,
    CachedTeacher,
    ColumnContext,
    LocalTeacher,
    PromptedTeacher,
    RoutedTeacher,
    ServerTeacher,
    SiblingContext,
    Teacher,
    TeacherPrompt,
)
from kdrl_lightning.teachers.frozen import FrozenModels
from kdrl_lightning.teachers.own_prompt.groups import Group, OwnPrompt, as_read, with_prompts
from kdrl_lightning.teachers.server import Row

CPU = torch.device("cpu")
PROMPT, OWN = "12+34=", "{context}#{prompt}"
SOLUTIONS = ["06,04#046", "", "1,2"]


def batch_of(groups: list[Group]) -> RolloutBatch:
    attempts = [(g, attempt) for g, group in enumerate(groups) for attempt in group.attempts]
    return collate(
        [attempt.prompt_ids for _, attempt in attempts],
        [attempt.completion.ids for _, attempt in attempts],
        [g for g, _ in attempts],
        pad_id=0,
    )


@pytest.fixture(scope="module")
def tokenizer(student_folder: str) -> Any:
    return load_tokenizer(student_folder)


def group_of(tokenizer: Any, row: dict[str, Any], *completions: tuple[str, float]) -> Group:
    ids = tokenizer(row["prompt"])["input_ids"]

    def attempt(text: str, reward: float) -> Any:
        sampled = [*tokenizer(text)["input_ids"], 1]
        completion = Completion(sampled, [0.0] * len(sampled), False)
        verdict = Verdict(reward, reward >= 1)
        return SimpleNamespace(
            row=row, prompt_ids=ids, completion=completion, text=text, verdict=verdict
        )

    return Group([attempt(*one) for one in completions])


@pytest.fixture
def siblings(tokenizer: Any) -> list[Group]:
    """Two groups: three completions of which two are equal, and two of a row with a solution."""
    first = {"prompt": PROMPT, "solution": ""}
    second = {"prompt": "99+01=", "solution": "10,10#100"}
    return [
        group_of(tokenizer, first, ("4#46", 1.0), ("4#46", 1.0), ("6,4#46", 1.0)),
        group_of(tokenizer, second, ("10", 0.0), ("100", 1.0)),
    ]


def loaded(teacher: Teacher, tokenizer: Any, folder: str) -> Any:
    teacher.check(tokenizer, folder)
    teacher.load(CPU)
    return teacher


def prompted(folder: str, tokenizer: Any, prompt: TeacherPrompt, dtype: str = "float64") -> Any:
    return loaded(PromptedTeacher(LocalTeacher(folder, dtype), prompt), tokenizer, folder)


def slow(folder: str, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
    """Each completion alone after its prompt: log p of token t is read at |s| + t - 1."""
    model = load_causal_lm(folder).double()
    out = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        out.append([logits[len(prompt) + t - 1, i].item() for t, i in enumerate(completion)])
    return out


def scored(teacher: Any, groups: list[Group]) -> tuple[RolloutBatch, TokenScores]:
    batch = with_prompts(batch_of(groups), teacher.own_prompts(groups))
    return batch, teacher.score(batch)


def test_completions_are_read_after_the_teachers_prompts(
    siblings: list[Group], tokenizer: Any, teacher_folder: str
) -> None:
    made = TeacherPrompt(SiblingContext(), OWN)
    batch, scores = scored(prompted(teacher_folder, tokenizer, made), siblings)
    # The second of the group's duplicates sees the first, the others too; the last one sees none.
    texts = ["4#46#12+34=", "4#46#12+34=", "4#46#12+34=", "100#99+01=", "99+01="]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    assert batch.has_context is not None and batch.has_context.tolist() == [True] * 4 + [False]
    assert batch.teacher_prompt_ids is not None
    assert batch.teacher_prompt_ids.tolist() == pad_rows(prompts, -1, torch.long).tolist()
    attempts = [attempt for group in siblings for attempt in group.attempts]
    expected = slow(teacher_folder, prompts, [a.completion.ids for a in attempts])
    assert scores.logprobs.shape == batch.completion_ids.shape
    for row, values in enumerate(expected):
        close(scores.logprobs[row, : len(values)], torch.tensor(values, dtype=torch.float64))
        assert not scores.logprobs[row, len(values) :].any()


@pytest.mark.parametrize("template", [None, "{prompt}"])
def test_the_students_prompt_is_the_plain_teacher_to_the_bit(
    siblings: list[Group], tokenizer: Any, teacher_folder: str, template: str | None
) -> None:
    teacher = prompted(teacher_folder, tokenizer, TeacherPrompt(template=template), "float32")
    batch, scores = scored(teacher, siblings)
    plain = teacher.teacher.score(batch)
    for ours, theirs in zip(scores, plain, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert torch.equal(teacher.states(batch).hidden, teacher.teacher.states(batch).hidden)
    assert batch.has_context is not None and batch.has_context.all()


class Live(LocalTeacher):
    """The student itself, with its present weights."""

    def look_at(self, student: Scorer, path: str) -> None:
        self._scorer = student


def test_the_live_student_after_its_own_prompt_has_no_gap(
    siblings: list[Group], tokenizer: Any, student_folder: str
) -> None:
    student = Scorer(load_causal_lm(student_folder))
    live = Live(student_folder)
    teacher = PromptedTeacher(live, TeacherPrompt())
    teacher.check(tokenizer, student_folder)
    teacher.look_at(student, student_folder)
    batch, scores = scored(teacher, siblings)
    other = teacher.states(batch)
    ours = student.score(batch, other=other, divergence=reverse_kl)
    assert torch.equal(ours.logprobs, scores.logprobs)
    assert ours.divergence is not None and float(ours.divergence.detach().abs().max()) < 1e-6
    seen = PromptedTeacher(live, TeacherPrompt(SiblingContext(), OWN))
    seen._tokenizer = tokenizer
    assert float((scored(seen, siblings)[1].logprobs - scores.logprobs).abs().max()) > 0.01


def test_equal_completions_with_different_contexts_stay_apart(
    tokenizer: Any, student_folder: str, teacher_folder: str
) -> None:
    """Whatever merges equal rows of the student must not merge what its teacher says of them."""
    row = {"prompt": PROMPT}
    groups = [group_of(tokenizer, row, ("4#46", 1.0), ("4#46", 0.0), ("4#46", 1.0))]
    ids = [tokenizer(text)["input_ids"] for text in ("1#12+34=", "22#12+34=", PROMPT)]
    batch = with_prompts(batch_of(groups), [OwnPrompt(i) for i in ids])
    teacher = prompted(teacher_folder, tokenizer, TeacherPrompt())
    student = Scorer(load_causal_lm(student_folder).double())
    alone = [batch.select([row]) for row in range(3)]

    def found(part: RolloutBatch) -> tuple[Tensor, Tensor, Tensor]:
        asked = torch.arange(4).expand(*part.completion_ids.shape, 4)
        top = teacher.score(part, asked).topk_logprobs
        scores = student.score(part, other=teacher.states(part), divergence=reverse_kl)
        assert scores.divergence is not None
        return teacher.score(part).logprobs, top, scores.divergence.detach()

    separate = [torch.cat(values) for values in zip(*map(found, alone), strict=True)]
    for shares in (False, True):
        student.shares = teacher.teacher._loaded().shares = shares
        for ours, theirs in zip(found(batch), separate, strict=True):
            close(ours, theirs)
    assert (separate[0][0] - separate[0][1]).abs().max() > 0.01
    assert (separate[2][0] - separate[2][1]).abs().max() > 1e-4


def test_select_keeps_prompts_with_their_rows(
    siblings: list[Group], tokenizer: Any, teacher_folder: str
) -> None:
    teacher = prompted(teacher_folder, tokenizer, TeacherPrompt(SiblingContext(), OWN))
    batch, scores = scored(teacher, siblings)
    for rows in ([3, 0], [4], [2, 4, 1]):
        part = teacher.score(batch.select(rows)).logprobs
        close(part, scores.logprobs[rows, : part.shape[1]])


def test_a_prompt_that_is_too_long_is_no_context_and_nothing_is_cut(
    siblings: list[Group], tokenizer: Any, teacher_folder: str
) -> None:
    # 4#46#12+34= has 11 tokens, 100#99+01= has 10.
    teacher = prompted(
        teacher_folder, tokenizer, TeacherPrompt(SiblingContext(), OWN, max_tokens=10)
    )
    prompts = teacher.own_prompts(siblings)
    assert [p.has_context for p in prompts] == [False, False, False, True, False]
    assert [p.dropped for p in prompts] == [True, True, True, False, False]
    assert prompts[0].ids == tokenizer(PROMPT)["input_ids"]


def test_prompt_and_completion_fit_into_the_teachers_context(
    tokenizer: Any, teacher_folder: str
) -> None:
    teacher = prompted(teacher_folder, tokenizer, TeacherPrompt(ColumnContext("solution"), OWN))
    assert teacher.context_length == 128
    row = {"prompt": PROMPT, "solution": "1" * 113}  # 120 tokens of the prompt
    exact = [group_of(tokenizer, row, ("1" * 7, 0.0), ("1" * 8, 0.0))]  # 8 and 9 with the end
    prompts = teacher.own_prompts(exact)
    assert [p.has_context for p in prompts] == [True, False]
    assert len(prompts[0].ids) == 120
    teacher.accept(with_prompts(batch_of(exact), prompts))


def test_a_sampled_context_that_cannot_be_rendered_is_dropped(
    tokenizer: Any, teacher_folder: str
) -> None:
    teacher = prompted(
        teacher_folder, tokenizer, TeacherPrompt(SiblingContext(), "{prompt}{context}")
    )
    # The prompt would end with an end token.
    bad = group_of(tokenizer, {"prompt": PROMPT}, ("<eos>", 1.0), ("1", 0.0))
    assert [(p.has_context, p.dropped) for p in teacher.own_prompts([bad])] == [
        (False, False),
        (False, True),
    ]


def test_a_cache_tells_the_teachers_prompts_apart(
    siblings: list[Group], tokenizer: Any, teacher_folder: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "scores.db")
    made = TeacherPrompt(SiblingContext(), OWN)
    inside = PromptedTeacher(CachedTeacher(LocalTeacher(teacher_folder), path), made)
    outside = CachedTeacher(PromptedTeacher(LocalTeacher(teacher_folder), made), path)
    plain = CachedTeacher(LocalTeacher(teacher_folder), path)
    for teacher in (inside, outside, plain):
        loaded(teacher, tokenizer, teacher_folder)
    assert outside.has_own_prompt and outside.contexts == inside.contexts
    batch, first = scored(inside, siblings)
    expected = prompted(teacher_folder, tokenizer, made, "float32").score(batch).logprobs
    torch.testing.assert_close(first.logprobs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(outside.score(batch).logprobs, expected, rtol=0, atol=1e-5)
    assert (outside.hits, outside.misses) == (0, 5)
    # Another context of the same completions, and none.
    for change in (SiblingContext(2.0), None):
        context = TeacherPrompt(change, OWN) if change else TeacherPrompt()
        other = PromptedTeacher(LocalTeacher(teacher_folder), context)
        loaded(other, tokenizer, teacher_folder)
        changed = with_prompts(batch_of(siblings), other.own_prompts(siblings))
        torch.testing.assert_close(
            outside.score(changed).logprobs, plain.score(changed).logprobs, rtol=0, atol=1e-5
        )
    again = outside.score(batch).logprobs
    assert torch.equal(again, outside.score(batch).logprobs) and outside.hits >= 10
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_routed_teachers_have_their_own_prompts(
    siblings: list[Group], tokenizer: Any, student_folder: str, teacher_folder: str
) -> None:
    data = [{"prompt": PROMPT, "teacher": "seen"}, {"prompt": "99+01=", "teacher": "plain"}]
    groups = [
        group_of(tokenizer, data[0], ("4#46", 1.0), ("4", 0.0)),
        group_of(tokenizer, data[1], ("10", 0.0), ("100", 1.0)),
    ]
    seen = PromptedTeacher(
        LocalTeacher(teacher_folder, "float64"), TeacherPrompt(SiblingContext(), OWN)
    )
    routed = RoutedTeacher({"plain": LocalTeacher(student_folder, "float64"), "seen": seen})
    loaded(routed, tokenizer, student_folder)
    route = torch.tensor([routed.route(a.row) for g in groups for a in g.attempts])
    assert routed.has_own_prompt and route.tolist() == [1, 1, 0, 0]
    prompts = routed.own_prompts(groups)
    assert prompts is not None
    assert [p.has_context for p in prompts] == [False, True, True, True]
    batch = with_prompts(batch_of(groups), prompts).replace(teacher_route=route)
    got = routed.score(batch).logprobs
    for rows, teacher in (([0, 1], seen), ([2, 3], routed.teachers["plain"])):
        alone = teacher.score(batch.select(rows)).logprobs
        close(got[rows, : alone.shape[1]], alone)
    assert routed.check_rows(data, tokenizer) == "" and routed.context_length == 128
    assert RoutedTeacher({"a": LocalTeacher(student_folder)}).own_prompts(groups) is None


def test_teachers_of_a_batch_are_planned_by_their_own_prompts() -> None:
    # One prompt of the student, two of the teacher, which are long: they do not fit together.
    batch = collate([[5]] * 4, [[6, 7]] * 4, [0] * 4, pad_id=0)
    own = with_prompts(batch, [OwnPrompt([n] * 20) for n in (1, 1, 2, 2)])
    parts = [[0], [1], [2], [3]]
    assert joined(parts, own, 30) == [[0, 1, 2, 3]]
    assert joined(parts, _by_prompt(as_read(own)), 30) == [[0, 1], [2, 3]]


def test_completions_without_the_teachers_prompts_are_refused(
    siblings: list[Group], tokenizer: Any, teacher_folder: str
) -> None:
    teacher = prompted(teacher_folder, tokenizer, TeacherPrompt(SiblingContext(), OWN))
    with pytest.raises(
        TrainingStopped, match=r"sampled with the teacher's own prompt: got some wi"
    ):
        teacher.score(batch_of(siblings))


def test_a_second_prompt_around_the_first_is_refused(teacher_folder: str, tmp_path: Path) -> None:
    once = PromptedTeacher(LocalTeacher(teacher_folder), TeacherPrompt())
    for inner in (once, RoutedTeacher({"a": once}), CachedTeacher(once, str(tmp_path / "a.db"))):
        with pytest.raises(ConfigurationError, match=r"must read the student's prompt: got one"):
            PromptedTeacher(inner, TeacherPrompt())


def test_it_samples_after_its_own_prompt_if_the_row_gives_it(
    tokenizer: Any, teacher_folder: str
) -> None:
    row = {"prompt": PROMPT, "solution": "06,04#046"}
    shown = prompted(teacher_folder, tokenizer, TeacherPrompt(ColumnContext("solution"), OWN))
    assert shown.generates and shown.sampling_weights() is not None
    assert shown.generation_prompt(row, [5]) == tokenizer("06,04#046#12+34=")["input_ids"]
    assert shown.generation_prompt({"prompt": PROMPT}, [5]) == [5]
    assert FrozenModels(shown).generation_prompt(row, [5]) == shown.generation_prompt(row, [5])
    assert FrozenModels(LocalTeacher(teacher_folder)).generation_prompt(row, [5]) == [5]
    # An evaluation would sample after the student's prompt, and siblings are not known yet.
    assert shown.weights() is None
    sibling = PromptedTeacher(LocalTeacher(teacher_folder), TeacherPrompt(SiblingContext()))
    assert not sibling.generates


def test_the_prompt_of_a_row_is_known_before_a_completion(
    tokenizer: Any, teacher_folder: str
) -> None:
    row = {"prompt": PROMPT, "solution": "06,04#046"}

    def of_row(context: Any, limit: int | None = None) -> Any:
        prompt = TeacherPrompt(context, OWN if context else None, max_tokens=limit)
        return prompted(teacher_folder, tokenizer, prompt).prompt_of_row(row)

    shown = ColumnContext("solution")
    assert of_row(shown) == tokenizer("06,04#046#12+34=")["input_ids"]
    assert of_row(None) == tokenizer(PROMPT)["input_ids"]
    assert of_row(ColumnContext("answer")) is of_row(SiblingContext()) is of_row(shown, 15) is None


def test_the_base_of_a_lora_student_reads_its_own_prompt(
    siblings: list[Group], tokenizer: Any, student_folder: str
) -> None:
    model = load_causal_lm(student_folder).double()
    LoRA(4).inject(model, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    made = TeacherPrompt(SiblingContext(), OWN)
    teacher = PromptedTeacher(AdapterOffTeacher(), made)
    teacher.check(tokenizer, student_folder)
    teacher.look_at(Scorer(model), student_folder)
    assert teacher.needs_lora and teacher.context_length == 128
    batch, scores = scored(teacher, siblings)
    close(scores.logprobs, prompted(student_folder, tokenizer, made).score(batch).logprobs)


def test_a_server_gets_the_teachers_prompts(
    siblings: list[Group], tokenizer: Any, teacher_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ServerTeacher(teacher_folder, ["http://127.0.0.1:1"], max_sequences=1)
    server._vocab_size, server._context = 16, 20
    asked: list[tuple[list[int], int]] = []

    def row(_: Any, ids: list[int], start: int, topk: Any) -> Row:
        asked.append((ids, start))
        return Row([-1.0] * (len(ids) - start), [0] * (len(ids) - start), [])

    monkeypatch.setattr(server, "_row", row)
    teacher = PromptedTeacher(server, TeacherPrompt(SiblingContext(), OWN))
    teacher.check(tokenizer, teacher_folder)
    batch, scores = scored(teacher, siblings)
    assert scores.logprobs.shape == batch.completion_ids.shape
    # 19 tokens fit: 11 of the prompt and at most 8 of the completion.
    assert batch.has_context is not None and batch.has_context.tolist() == [True] * 4 + [False]
    texts = ["4#46#12+34=4#46<eos>"] * 2 + ["4#46#12+34=6,4#46<eos>"]
    texts += ["100#99+01=10<eos>", "99+01=100<eos>"]
    assert [tokenizer.decode(ids) for ids, _ in asked] == texts
    assert [start for _, start in asked] == [11, 11, 11, 10, 6]
