"""A teacher whose tokenizer merges what the student writes in single characters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from torch import Tensor

from helpers.short_runs import Trace, fit, make_data, make_module
from helpers.small_tokenizers import by_hand, wrapped
from kdrl_lightning import (
    EOPD,
    GKD,
    KDRL,
    RLAD,
    CachedTeacher,
    ColumnContext,
    CrossTokenizerTeacher,
    LocalTeacher,
    PromptedTeacher,
    RoutedTeacher,
    ServerTeacher,
    TeacherPrompt,
)
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.losses.logprobs import LOGPROB_FLOOR, TokenScores
from kdrl_lightning.metrics.update_stats import UpdateStats
from kdrl_lightning.models.loading import load_causal_lm, load_tokenizer
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers.cross_tokenizer.teacher import same_vocabulary
from kdrl_lightning.teachers.frozen import FrozenModels
from kdrl_lightning.teachers.own_prompt.groups import Group
from kdrl_lightning.tiny.addition import SYMBOLS

CPU = torch.device("cpu")
MERGES = [(a, b) for a in "01" for b in "0123456789"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}#"


def save(folder: Path, tokenizer: Any, seed: int) -> str:
    """A random Llama of this tokenizer; its class does not change the tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = by_hand([*SYMBOLS, *(a + b for a, b in MERGES)], MERGES)
    tokenizer.chat_template = TEMPLATE
    return save(tmp_path_factory.mktemp("merging"), tokenizer, 7)


def ready(teacher: Any, student: str) -> Any:
    teacher.check(load_tokenizer(student), student)
    teacher.load(CPU)
    return teacher


def batch_of(teacher: Any, student: str, texts: list[tuple[str, str]], **more: Any) -> RolloutBatch:
    """Completions of the student, one character a token; those with "." are not cut."""
    tokenizer = load_tokenizer(student)

    def ids(text: str) -> list[int]:
        return [*tokenizer(text.rstrip("."))["input_ids"], *[1] * text.endswith(".")]

    made = collate(
        [ids(prompt) for prompt, _ in texts],
        [ids(completion) for _, completion in texts],
        list(range(len(texts))),
        pad_id=0,
        truncated=[not completion.endswith(".") for _, completion in texts],
        **more,
    )
    return FrozenModels(teacher).write_prompts(made, groups([{"prompt": p} for p, _ in texts]))


def groups(rows: list[Any]) -> list[Any]:
    return [
        Group([SimpleNamespace(row=row, prompt_ids=[3, 3], completion=SimpleNamespace(ids=[3]))])
        for row in rows
    ]  # type: ignore[list-item]


TEXTS = [("12+34=", "06,04#46."), ("1+1=", "0102030"), ("99+10=", "."), ("7+10=", "1,1,11")]


def by_transformers(folder: str, prompt: str, completion: str) -> list[tuple[str, float]]:
    """The teacher's tokens of a completion with their log-probabilities."""
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder)
    before = tokenizer(prompt)["input_ids"]
    ids = tokenizer(completion.rstrip("."))["input_ids"] + [1] * completion.endswith(".")
    with torch.no_grad():
        rows = model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
    at = range(len(before) - 1, len(before) + len(ids) - 1)
    words = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    return [(w, float(rows[t, i])) for w, t, i in zip(words, at, ids, strict=True)]


def test_each_token_gets_its_chunks_log_probability(student_folder: str, merging: str) -> None:
    teacher = ready(CrossTokenizerTeacher(LocalTeacher(merging)), student_folder)
    assert teacher.aligns and not teacher.knows_entropy
    assert teacher.weights() is None  # they would sample after the student's tokens
    batch = batch_of(teacher, student_folder, TEXTS)
    scores = teacher.score(batch)
    for row, (prompt, completion) in enumerate(TEXTS):
        expected, places = [], []
        for word, value in by_transformers(merging, prompt, completion):
            size = 1 if word == "<eos>" else len(word)
            expected += [value] * size
            places += range(size)
        length = len(expected)
        assert scores.chunk_places[row, :length].tolist() == places
        torch.testing.assert_close(
            scores.logprobs[row, :length], torch.tensor(expected), rtol=1e-5, atol=1e-5
        )
        assert not scores.logprobs[row, length:].any()


def test_the_worker_aligns_what_the_rollout_accepted(student_folder: str, merging: str) -> None:
    """Parts of the rollout, in any order, find their rows; others are aligned when asked for."""
    teacher = ready(CrossTokenizerTeacher(LocalTeacher(merging)), student_folder)
    batch = batch_of(teacher, student_folder, TEXTS)
    alone = teacher.score(batch)
    teacher.accept(batch)
    for rows in ([2, 0], [1], [3]):
        part = teacher.score(batch.select(rows))
        width = part.logprobs.shape[1]
        torch.testing.assert_close(part.logprobs, alone.logprobs[rows, :width])
    teacher.accept(batch.select([0]))
    assert torch.equal(teacher.score(batch).chunk_places, alone.chunk_places)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_one_vocabulary_it_is_the_plain_teacher(
    student_folder: str, teacher_folder: str, temperature: float
) -> None:
    """Bit for bit, also for tokens of the student that its tokenizer would not write."""
    plain = ready(LocalTeacher(teacher_folder), student_folder)
    cross = ready(CrossTokenizerTeacher(LocalTeacher(teacher_folder)), student_folder)
    assert not cross.aligns and cross.knows_entropy and cross.gives_states
    batch = batch_of(cross, student_folder, TEXTS).replace(temperature=temperature)
    asked = torch.randint(0, 16, (*batch.completion_ids.shape, 2))
    for topk_ids in None, asked:
        ours, theirs = cross.score(batch, topk_ids), plain.score(batch, topk_ids)
        for name, a, b in zip(TokenScores._fields, ours, theirs, strict=True):
            assert (a is None) == (b is None), name
            assert a is None or torch.equal(a, b), name
    assert torch.equal(cross.states(batch).hidden, plain.states(batch).hidden)


@pytest.mark.parametrize("translates", [False, True])
def test_with_one_vocabulary_the_end_is_the_teachers(
    student_folder: str, tmp_path: Path, translates: bool
) -> None:
    """Once, whoever translates it."""
    tokenizer = load_tokenizer(student_folder)
    tokenizer.eos_token = "#"
    folder = save(tmp_path, tokenizer, 3)
    local = LocalTeacher(folder, translate_end_token=translates)
    teacher = ready(CrossTokenizerTeacher(local), student_folder)
    batch = batch_of(teacher, student_folder, [("1+1=", "02.")])
    end = tokenizer.convert_tokens_to_ids("#")
    ids = torch.cat([batch.input_ids[:, :-1], torch.tensor([[end]])], 1)
    with torch.no_grad():
        rows = load_causal_lm(folder)(ids).logits[0, :, :16].log_softmax(-1)
    assert not teacher.aligns and teacher.other_end is None
    torch.testing.assert_close(teacher.score(batch).logprobs[0, -1], rows[-2, end])


def test_one_vocabulary_with_other_merges_is_another_tokenizer(tmp_path: Path) -> None:
    """``abc`` is ``ab|c`` to the student and ``a|bc`` to the teacher."""
    pieces, merges = [*"abc", "ab", "bc"], [("a", "b"), ("b", "c")]
    student = save(tmp_path / "s", by_hand(pieces, merges), 1)
    theirs = save(tmp_path / "t", by_hand(pieces, merges[::-1]), 2)
    plain, cross = LocalTeacher(theirs), CrossTokenizerTeacher(LocalTeacher(theirs))
    with pytest.warns(UserWarning, match=r"have one vocabulary and different merges .* Wrap it in"):
        plain.check(load_tokenizer(student), student)
    ready(cross, student)
    assert cross.aligns
    ids = load_tokenizer(student)("abcab")["input_ids"]
    batch = collate([[2]], [[*ids, 1]], [0], pad_id=0)
    batch = FrozenModels(cross).write_prompts(batch, groups([{"prompt": "a"}]))
    scores = cross.score(batch)
    assert ids == [5, 4, 5] and scores.chunk_places.tolist() == [[0, 1, 0, 0]]  # type: ignore[union-attr]
    expected = [value for _, value in by_transformers(theirs, "a", "abcab.")]  # a|bc|ab|<eos>
    totals = [expected[0] + expected[1]] * 2 + expected[2:]
    torch.testing.assert_close(scores.logprobs[0], torch.tensor(totals))


def equal(ours: TokenScores, theirs: TokenScores) -> None:
    torch.testing.assert_close(ours.logprobs, theirs.logprobs)
    assert torch.equal(ours.chunk_places, theirs.chunk_places)  # type: ignore[arg-type]


def test_it_wraps_and_is_wrapped(student_folder: str, merging: str, tmp_path: Path) -> None:
    plain = ready(CrossTokenizerTeacher(LocalTeacher(merging)), student_folder)
    batch = batch_of(plain, student_folder, TEXTS)
    expected = plain.score(batch)
    inside = CrossTokenizerTeacher(CachedTeacher(LocalTeacher(merging), str(tmp_path / "a.db")))
    outside = CachedTeacher(CrossTokenizerTeacher(LocalTeacher(merging)), str(tmp_path / "b.db"))
    for cached in inside, outside:
        ready(cached, student_folder)
        equal(cached.score(batch), expected)
        equal(cached.score(batch), expected)
        assert cached.aligns
    assert (outside.hits, outside.misses) == (4, 4)
    # Another prompt of the teacher is another key.
    outside.score(batch.replace(teacher_prompt_ids=batch.teacher_prompt_ids.flip(1).clamp(min=2)))  # type: ignore[union-attr]
    assert outside.misses == 8


def test_a_routed_teacher_of_both_kinds_fills_the_places(
    student_folder: str, teacher_folder: str, merging: str
) -> None:
    """A row of the plain teacher has chunks of one token, whichever rows a batch holds."""
    cross, near = CrossTokenizerTeacher(LocalTeacher(merging)), LocalTeacher(teacher_folder)
    both = ready(RoutedTeacher({"cross": cross, "near": near}), student_folder)
    texts = TEXTS[:2]
    rows = [{"prompt": p, "teacher": t} for (p, _), t in zip(texts, ("cross", "near"), strict=True)]
    batch = batch_of(None, student_folder, texts, teacher_route=[0, 1])
    batch = FrozenModels(both).write_prompts(batch, groups(rows))
    assert both.aligns and batch.teacher_ends.tolist() == [1, -1]  # type: ignore[union-attr]
    got = both.score(batch)
    equal(
        got.map(lambda v: v[:1]),
        cross.score(batch.select([0])),
    )
    own = near.score(batch.select([1])).logprobs
    torch.testing.assert_close(got.logprobs[1:, : own.shape[1]], own)
    assert not got.chunk_places[1].any()
    alone = both.score(batch.select([1]))
    assert alone.chunk_places is not None and float(alone.logprobs.min()) >= LOGPROB_FLOOR


def test_lengths_are_those_of_the_tokens_that_teachers_read(
    student_folder: str, teacher_folder: str, merging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another tokenizer, with its own prompt, and with both kinds routed."""
    prompt = TeacherPrompt(ColumnContext("hint"), "{context},{prompt}")
    cross = CrossTokenizerTeacher(LocalTeacher(merging))
    own = PromptedTeacher(LocalTeacher(teacher_folder), prompt)
    both = ready(RoutedTeacher({"cross": cross, "own": own}), student_folder)
    seen: list[int] = []
    score = LocalTeacher.score

    def noted(self: LocalTeacher, batch: RolloutBatch, topk_ids: Any = None) -> TokenScores:
        seen.extend(batch.lengths.tolist())
        return score(self, batch, topk_ids)

    monkeypatch.setattr(LocalTeacher, "score", noted)
    texts = TEXTS[:2]
    rows = [
        {"prompt": p, "hint": "12,3", "teacher": t}
        for (p, _), t in zip(texts, ("cross", "own"), strict=True)
    ]
    batch = batch_of(None, student_folder, texts, teacher_route=[0, 1])
    batch = FrozenModels(both).write_prompts(batch, groups(rows))
    both.score(batch)
    assert both.lengths(batch).tolist() == seen == [12, 16]
    assert batch.lengths.tolist() == [15, 11]


def test_prompts_are_the_teachers_own(student_folder: str, merging: str) -> None:
    teacher = ready(CrossTokenizerTeacher(LocalTeacher(merging)), student_folder)
    tokenizer = load_tokenizer(merging)
    row = {"prompt": [{"role": "user", "content": "10+1="}]}
    chat, plain = teacher.own_prompts(groups([row, {"prompt": "10+1="}]))
    assert chat.ids == tokenizer("10+1=#")["input_ids"] and chat.end == plain.end == 1
    assert plain.ids == tokenizer("10+1=")["input_ids"]
    with pytest.raises(ConfigurationError, match=r"context of 128 tokens: got 130 tokens"):
        teacher.check_row({"prompt": "+" * 130}, None)
    # A completion that does not fit into the teacher's context is scored up to its end.
    (batch,) = (batch_of(teacher, student_folder, [("+" * 124, "1,2,3,4.")]),)
    assert teacher.score(batch).chunk_places[0].tolist() == [0] * 4 + [-1] * 4


@pytest.mark.parametrize("limit", [1, 2, None])
def test_chunks_above_the_limit_are_dropped_and_counted(
    student_folder: str, merging: str, limit: int | None
) -> None:
    teacher = ready(CrossTokenizerTeacher(LocalTeacher(merging), limit), student_folder)
    batch = batch_of(teacher, student_folder, TEXTS)
    scores, stats = teacher.score(batch), UpdateStats()
    batch = batch.replace(
        teacher_logprobs=scores.logprobs, chunk_places=scores.chunk_places, old_logprobs=None
    )
    stats.add(batch, torch.zeros(batch.loss_mask.shape), torch.tensor(0.0), {})
    words = [
        [1 if word == "<eos>" else len(word) for word, _ in by_transformers(merging, *text)]
        for text in TEXTS
    ]
    sizes = [size for row in words for size in row]
    dropped = [size for size in sizes if limit is not None and size > limit]
    assert sizes.count(2) > 2 and bool(dropped) == (limit == 1)
    assert stats.finish()["kd/unaligned_frac"] == pytest.approx(sum(dropped) / sum(sizes))


def test_the_teachers_template_may_add_bos_and_a_system_prompt(
    student_folder: str, merging: str, tmp_path: Path
) -> None:
    """There is one BOS, and the student's prompt has neither."""
    tokenizer = load_tokenizer(merging)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}99#" + TEMPLATE
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    folder = save(tmp_path, tokenizer, 5)
    assert load_tokenizer(folder)("1")["input_ids"][0] == bos
    teacher = ready(CrossTokenizerTeacher(LocalTeacher(folder)), student_folder)
    chat = {"prompt": [{"role": "user", "content": "10=1"}]}
    seen, text = teacher.own_prompts(groups([chat, {"prompt": "10=1"}]))
    bare = [tokenizer.convert_tokens_to_ids(t) for t in ("9", "9", "#", "10", "=", "1", "#")]
    assert seen.ids == [bos, *bare] and text.ids == [bos, *bare[3:6]]
    batch = batch_of(None, student_folder, [("1=", "11.")])
    scores = teacher.score(FrozenModels(teacher).write_prompts(batch, groups([chat])))
    eleven = tokenizer.convert_tokens_to_ids("11")
    with torch.no_grad():
        rows = load_causal_lm(folder)(torch.tensor([[bos, *bare, eleven, 1]])).logits[0]
    expected = rows.log_softmax(-1)
    values = [expected[-3, eleven]] * 2 + [expected[-2, 1]]
    torch.testing.assert_close(scores.logprobs[0], torch.stack(values))


def test_the_wrapped_teacher_may_have_a_prompt_of_its_own(
    student_folder: str, merging: str
) -> None:
    """It writes it in its own tokens; without a context it reads the row's prompt in these."""
    prompt = TeacherPrompt(ColumnContext("hint"), "{context},{prompt}", prefix="10")
    teacher = CrossTokenizerTeacher(PromptedTeacher(LocalTeacher(merging), prompt))
    ready(teacher, student_folder)
    tokenizer = load_tokenizer(merging)
    rows = [{"prompt": "1+10=", "hint": "11"}, {"prompt": "1+10="}]
    seen, unseen = teacher.own_prompts(groups(rows))
    assert seen.ids == tokenizer("11,1+10=")["input_ids"] + tokenizer("10")["input_ids"]
    assert unseen.ids == tokenizer("1+10=")["input_ids"]
    assert (seen.end, seen.has_context, unseen.end, unseen.has_context) == (1, True, 1, False)
    plain = batch_of(None, student_folder, [("1+10=", "11.")])
    one = FrozenModels(teacher).write_prompts(plain, groups(rows[:1]))
    expected = by_transformers(merging, "11,1+10=10", "11.")
    value = teacher.score(one).logprobs[0]
    torch.testing.assert_close(value, torch.tensor([expected[0][1]] * 2 + [expected[1][1]]))


@pytest.mark.parametrize(
    ("objective", "what"),
    [
        (EOPD(), r"EOPD, which compares the teacher's 16 most likely tokens"),
        (GKD(), r"GKD, which compares distributions over the full vocabulary"),
        (GKD(top_k=4), r"GKD, which compares the student's 4 most likely tokens"),
        (KDRL(kl_estimator="full_vocabulary"), r"KDRL, which compares distributions"),
    ],
)
def test_only_sampled_tokens_can_be_compared(
    student_folder: str, merging: str, objective: Any, what: str
) -> None:
    frozen = FrozenModels(CrossTokenizerTeacher(LocalTeacher(merging)))
    with pytest.raises(ConfigurationError, match=f"must compare sampled tokens .*got {what}"):
        frozen.check(load_tokenizer(student_folder), student_folder, objective)
    frozen.check(load_tokenizer(student_folder), student_folder, RLAD())


def test_bad_settings(student_folder: str, merging: str) -> None:
    with pytest.raises(ConfigurationError, match=r"`max_chunk_tokens` must be at least 1: got 0"):
        CrossTokenizerTeacher(LocalTeacher(merging), 0)
    two = {"a": LocalTeacher(merging), "b": LocalTeacher(student_folder)}
    with pytest.raises(ConfigurationError, match="must have one tokenizer in a CrossTokenizer"):
        CrossTokenizerTeacher(RoutedTeacher(two)).check_row({"prompt": "1"}, None)
    teacher = ready(CrossTokenizerTeacher(LocalTeacher(merging)), student_folder)
    with pytest.raises(TrainingStopped, match="with the teacher's own prompt and end token: got s"):
        teacher.score(collate([[3]], [[4]], [0], pad_id=0))
    one = RoutedTeacher({"a": LocalTeacher(merging)}).tokenizer_path
    assert one == ServerTeacher(merging, ["http://127.0.0.1:1"]).tokenizer_path == merging


def test_a_tokenizer_that_changes_text_is_named_once(student_folder: str, merging: str) -> None:
    teacher = ready(CrossTokenizerTeacher(LocalTeacher(merging)), student_folder)
    batch = batch_of(teacher, student_folder, TEXTS)
    rows = teacher._rows(batch)
    changed = [SimpleNamespace(differs_at=2) for _ in rows]
    with pytest.warns(UserWarning, match=r"as it is, first at byte 2, after b'06'\. The teacher"):
        teacher._warn_of_changed_text(batch, changed)
    teacher._warn_of_changed_text(batch, changed)


@pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
def test_a_run_learns_from_chunks(tmp_path: Path, student_folder: str, merging: str) -> None:
    """Whole chunks reach the loss, the statistics and the checks of a real run."""
    teacher = CrossTokenizerTeacher(LocalTeacher(merging), max_chunk_tokens=2)
    module, trace = make_module(student_folder, teacher, KDRL(0.1)), Trace()
    logged: dict[str, float] = {}
    keep = module.log_step
    module.log_step = lambda values: (logged.update(values), keep(values))[1]  # type: ignore[method-assign]
    fit(tmp_path, module, make_data(val_prompts=None), max_steps=2, callbacks=[trace])
    assert logged["kd/unaligned_frac"] == 0.0 and "kd/floored_frac" not in logged
    assert 1.0 < logged["kd/chunk_tokens_mean"] < logged["kd/chunk_tokens_max"] == 2.0
    for _, batch in trace.seen:
        places: Tensor = batch.chunk_places
        joined = (places[:, 1:] == 1) & batch.completion_mask[:, 1:]
        teachers = batch.teacher_logprobs
        assert torch.equal(teachers[:, 1:][joined], teachers[:, :-1][joined])
        assert joined.any() and batch.imitation_mask[batch.loss_mask].all()


@pytest.mark.filterwarnings("ignore:the teacher .* has:UserWarning")
def test_a_teacher_with_one_more_word_writes_other_tokens() -> None:
    """WordPiece has no merges that would differ; an added token is no word."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "##b": 4}
    plain, more, added = (
        wrapped(Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>")))
        for vocabulary in (words, {**words, "ab": 5}, words)
    )
    added.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert same_vocabulary(plain, plain) and same_vocabulary(plain, added)
    assert not same_vocabulary(plain, more)
