"""Texts that tokenizers are known to break, and teachers that are reached in other ways."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from helpers.small_tokenizers import make, wrapped
from helpers.with_vllm.teaching import Teaching
from kdrl_lightning import (
    CachedTeacher,
    ColumnContext,
    CrossTokenizerTeacher,
    LocalTeacher,
    PromptedTeacher,
    RoutedTeacher,
    SelfTeacher,
    ServerTeacher,
    TeacherPrompt,
)
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.rollout_batch import collate
from kdrl_lightning.teachers.cross_tokenizer import Aligner, Chunked, TextEncoder, TokenBytes
from kdrl_lightning.teachers.own_prompt.groups import OwnPrompt, with_prompts
from kdrl_lightning.teachers.self_teachers.rules import InitialWeights
from kdrl_lightning.tiny import TinyModel

END = 1
# Other alphabets than those of the tokenizers in the tests of the aligner.
TRAINED = (
    "Η απάντηση είναι 1.234,5 και όχι 0x7F. उत्तर ४२ है। 정답은 42입니다. ∑∫≤ → ∞ ½ ﬁ ① Å K̂ \t\n\n"
)
KINDS = ("bpe", "digits", "metaspace", "unigram_bytes")
SHARED, LONE = "<tool>", "<mine>"  # special tokens of both sides, and of the student alone
TEXTS = {
    "compositions": "e\u0301é ﬁ ① ½ K Å ﷺ",
    "joined emoji": "👩🏽‍💻👨‍👩‍👧‍👦🏳️‍🌈1️⃣",
    "right to left": "\u202eabc\u202c مرحبا 12 שלום\u200f.",
    "combining": "a\u0300\u0301\u0302 \u0300b ก็ क्षि",
    "spaces": "  a \u00a0\u3000\u2009\ufeff\tb\r\n \n c  ",
    "digits": "0123456789 ४२ ٣٤ 1,234.5e-6",
    "names of tokens": "<eos> <pad><|im_end|> <unk> <0x41> ▁ Ġ ##a",
    "controls": "a\x00b\x07\x1b[0m\u2028\u2029\x7f",
    "nothing": "",
}


@cache
def tokens(kind: str, *special: str) -> TokenBytes:
    made = make(kind, TRAINED, 360)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return TokenBytes(made, kind, [END])


@cache
def aligner(student: str, teacher: str) -> Aligner:
    return Aligner(tokens(student, SHARED, LONE), tokens(teacher, SHARED), [END])


def by_bytes(found: Aligner, ids: list[int], theirs: list[int]) -> tuple[list[int], list[int]]:
    """Places and columns of a student's tokens, from the bytes at which tokens of both end."""

    def ends(known: TokenBytes, some: list[int]) -> list[int]:
        sizes = [len(known.pieces[i] or known.special[i]) for i in some]
        return [sum(sizes[: n + 1]) for n in range(len(some))]

    ours, other = ends(found.student, ids), ends(found.teacher, theirs)
    shared = sorted(set(ours) & set(other))

    def chunk(end: int) -> int | None:
        return next((at for at in shared if end <= at), None)

    mine, there = [chunk(end) for end in ours], [chunk(end) for end in other]
    places = [-1 if c is None else n - mine.index(c) for n, c in enumerate(mine)]
    return places, [0 if c is None else there.index(c) for c in mine]


def check_chunks(found: Aligner, ids: list[int], one: Chunked) -> None:
    """Compare with ``by_bytes``, up to a special token that the teacher does not have."""
    theirs = one.teacher_ids.tolist()
    if (one.places < 0).all():
        return
    stop = ids.index(lone(found)) if lone(found) in ids else len(ids)
    places, columns = by_bytes(found, ids[:stop], theirs)
    gap = len(ids) - stop
    assert one.places.tolist() == places + [-1] * gap
    assert one.columns.tolist() == columns + [0] * gap


def lone(found: Aligner) -> int:
    return found.student.id_of_special[LONE]


def first_difference(a: bytes, b: bytes) -> int:
    pairs = zip(a, b, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def right_or_first_byte(student: str, teacher: str, text: bytes) -> None:
    """The teacher's tokens write the text, or all of it up to the first byte that differs."""
    found = aligner(student, teacher)
    (ids,) = TextEncoder(found.student)([text])
    if -1 in ids:
        return
    text = found.student.text(ids)  # to sentencepiece ▁ is a space
    (one,) = found([np.array([*ids, END])], [END])
    check_chunks(found, [*ids, END], one)
    body = [i for i in one.teacher_ids.tolist() if i != END]
    if one.differs_at is None:
        assert found.teacher.text(body) == text and (one.places >= 0).all()
        assert one.teacher_ids[-1] == END
        return
    (whole,) = found.encode([text])
    known = next((n for n, i in enumerate(whole) if i < 0 or not found.teacher.plain[i]), None)
    assert one.differs_at == first_difference(found.teacher.text(whole[:known]), text)
    assert text.startswith(found.teacher.text(body)) and one.places[-1] == -1


@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
def test_hard_texts_are_right_or_named_by_the_first_byte(text: str) -> None:
    for student in KINDS:
        for teacher in KINDS:
            right_or_first_byte(student, teacher, text.encode())
            right_or_first_byte(student, teacher, b"x" + text.encode()[:-1])  # half a character


ALPHABET = sorted({*TRAINED, *"".join(TEXTS.values())})


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from(ALPHABET), max_size=25),
    st.integers(0, 3),
    st.sampled_from([(a, b) for a in KINDS for b in KINDS if a != b]),
)
def test_random_texts_of_other_alphabets(text: str, cut: int, pair: tuple[str, str]) -> None:
    raw = text.encode()
    right_or_first_byte(*pair, raw[: len(raw) - cut])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(st.sampled_from(ALPHABET), max_size=8).map(str.encode),
            st.sampled_from([SHARED, SHARED, LONE]),
        ),
        max_size=6,
    ),
    st.sampled_from([(a, b) for a in KINDS for b in KINDS]),
)
def test_special_tokens_between_texts(parts: list[Any], pair: tuple[str, str]) -> None:
    """A special token that both have is a chunk; after one that the teacher lacks is no score."""
    found = aligner(*pair)
    student, ids = found.student, []
    for part in parts:
        own = TextEncoder(student)([part])[0] if isinstance(part, bytes) else None
        ids += [student.id_of_special[part]] if own is None else [i for i in own if i >= 0]
    ids.append(END)
    (one,) = found([np.array(ids)], [END])
    check_chunks(found, ids, one)
    before = ids[: ids.index(lone(found))] if lone(found) in ids else ids
    plain = b"".join(student.pieces[i] or b"" for i in before)
    if one.differs_at is None:
        assert (one.places[: len(before)] >= 0).all() and (one.places[len(before) :] == -1).all()
        written = [found.teacher.pieces[i] or b"" for i in one.teacher_ids.tolist()]
        assert b"".join(written) == plain
        tools = [n for n, i in enumerate(before) if i == student.id_of_special[SHARED]]
        theirs = found.teacher.id_of_special[SHARED]
        assert all(one.teacher_ids[one.columns[n]] == theirs for n in tools)
        assert all(one.places[n] == 0 for n in tools)


@pytest.mark.parametrize(
    ("change", "text", "at"),
    [
        (normalizers.StripAccents(), "cafe\u0301 x", 4),
        (normalizers.Replace("—", "-"), "é — b", 3),
        (normalizers.Replace(Regex(" {2,}"), " "), "a b  c", 4),  # as T5's
        (normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("ﬁ", "fi")]), "a ﬁ b", 2),
    ],
)
def test_a_normaliser_is_named_by_the_first_byte_it_changes(
    change: Any, text: str, at: int
) -> None:
    made = Tokenizer.from_str(make("bpe", TRAINED, 360).backend_tokenizer.to_str())
    made.normalizer = change
    teacher = TokenBytes(wrapped(made), "t", [END])
    found = Aligner(tokens("digits"), teacher, [END])
    found.refuse_changed_text()  # ASCII comes back as it is
    (ids,) = TextEncoder(found.student)([text.encode()])
    one, again = found([np.array([*ids, END])] * 2, [END] * 2)
    assert one.differs_at == again.differs_at == at
    assert teacher.text(one.teacher_ids.tolist()) == text.encode()[:at]


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_a_teacher_reads_what_unicode_normalisation_would_change(form: str) -> None:
    """Its own pipeline would write other characters than the student did."""
    made = Tokenizer.from_str(make("bpe", TRAINED, 360).backend_tokenizer.to_str())
    made.normalizer = getattr(normalizers, form)()
    teacher = TokenBytes(wrapped(made), "t", [END])
    found = Aligner(tokens("digits"), teacher, [END])
    text = "ﬁ ① ½ e\u0301 é Å"
    assert made.normalizer.normalize_str(text) != text
    (ids,) = TextEncoder(found.student)([text.encode()])
    (one,) = found([np.array([*ids, END])], [END])
    assert teacher.text(one.teacher_ids[:-1].tolist()) == text.encode()
    assert one.differs_at is None and (one.places >= 0).all()


@pytest.mark.parametrize(
    "change",
    [
        normalizers.Lowercase(),
        normalizers.Strip(),
        normalizers.BertNormalizer(),
        normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()]),
        normalizers.Replace("\n", " "),
    ],
)
def test_a_normaliser_of_ascii_is_refused(change: Any) -> None:
    made = Tokenizer.from_str(make("bpe", TRAINED, 360).backend_tokenizer.to_str())
    made.normalizer = change
    found = Aligner(tokens("digits"), TokenBytes(wrapped(made), "t", [END]), [END])
    with pytest.raises(ConfigurationError, match=r"must write what the .* first different at byte"):
        found.refuse_changed_text()


def word_pieces() -> Any:
    """A WordPiece that can write ``<eos>`` and ``<unk>`` letter by letter."""
    letters = [*"<", *(f"##{c}" for c in "eosunk>")]
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<eos>", "<unk>", *letters])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return wrapped(made)


@pytest.mark.parametrize(
    ("make_one", "name"),
    [
        (lambda: make("unigram_bytes", TRAINED, 360), "<eos>"),
        (lambda: make("unigram_bytes", TRAINED, 360), "<unk>"),
        (lambda: make("bpe", TRAINED, 360), "<eos>"),
        (word_pieces, "<eos>"),
    ],
)
def test_the_name_of_a_special_token_is_text(make_one: Any, name: str) -> None:
    """Also if it is a piece of the model's vocabulary, which a whole word may be."""
    known = TokenBytes(make_one(), "t", [END])
    (ids,) = TextEncoder(known)([name.encode()])
    assert known.text(ids) == name.encode() and len(ids) > 1


def test_an_added_token_within_a_text_is_its_bytes() -> None:
    """Of the teacher it is one token; of the student, it is the text that it stands for."""
    student, teacher = (make(kind, TRAINED, 360) for kind in ("digits", "bpe"))
    teacher.add_tokens(["και", "<think>"])
    student.add_tokens(["<think>"])
    found = Aligner(TokenBytes(student, "s", [END]), TokenBytes(teacher, "t", [END]), [END])
    text = "1 και<think>2".encode()
    (ids,) = TextEncoder(found.student)([text])
    think = student.convert_tokens_to_ids("<think>")
    assert think in ids
    (one,) = found([np.array([*ids, END])], [END])
    named = teacher.convert_tokens_to_ids(["και", "<think>"])
    assert set(named) <= set(one.teacher_ids.tolist()) and one.differs_at is None
    assert one.places[ids.index(think)] == 0


def test_one_crosses_tokenizers_once(teacher_folder: str) -> None:
    cross = CrossTokenizerTeacher(LocalTeacher(teacher_folder))
    for inner in cross, RoutedTeacher({"a": cross}):
        with pytest.raises(
            ConfigurationError, match=r"must not be or contain another one: got [CR]"
        ):
            CrossTokenizerTeacher(inner)
    prompt = TeacherPrompt(ColumnContext("hint"), "{context},{prompt}")
    with pytest.raises(ConfigurationError, match=r"a CrossTokenizerTeacher goes around it"):
        PromptedTeacher(cross, prompt)


def test_a_self_teacher_has_the_students_tokens(student_folder: str) -> None:
    teacher = CrossTokenizerTeacher(SelfTeacher(InitialWeights()))
    teacher.check(load_tokenizer(student_folder), student_folder)
    assert not teacher.aligns and teacher.lengths(collate([[3]], [[4, 5]], [0], pad_id=0)) == 3


def test_a_served_teacher_scores_chunks_by_hand(student_folder: str, tmp_path: Path) -> None:
    """Each token of the teacher has ``-(id + 1) / 10``; also after a cache."""
    folder = TinyModel(role="merging_teacher").path()
    theirs, ours = load_tokenizer(folder), load_tokenizer(student_folder)
    server = Teaching(theirs)
    inner = ServerTeacher(folder, [server.url], max_away_s=2.0, timeout_s=2.0)
    teacher = CachedTeacher(CrossTokenizerTeacher(inner), str(tmp_path / "scores.db"))
    teacher.check(ours, student_folder)
    teacher.load(torch.device("cpu"))
    batch = collate([ours("1+2=")["input_ids"]], [[*ours("03#3")["input_ids"], END]], [0], pad_id=0)
    batch = with_prompts(batch, [OwnPrompt(theirs("1+2=")["input_ids"], end=END)])
    values = {t: -(i + 1) / 10 for t, i in theirs.get_vocab().items()}
    expected = [values["03"]] * 2 + [values["#"], values["3"], values["<eos>"]]
    try:
        for _ in range(2):
            scores = teacher.score(batch)
            torch.testing.assert_close(scores.logprobs, torch.tensor([expected]))
            assert scores.chunk_places is not None
            assert scores.chunk_places.tolist() == [[0, 1, 0, 0, 0]]
    finally:
        server.http.shutdown()
        server.http.server_close()
