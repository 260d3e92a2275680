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
from tokenizers import Tokenizer, normalizers

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
from kdrl_lightning.teachers.cross_tokenizer import Aligner, TextEncoder, TokenBytes
from kdrl_lightning.teachers.own_prompt.groups import OwnPrompt, with_prompts
from kdrl_lightning.teachers.self_teachers.rules import InitialWeights
from kdrl_lightning.tiny import TinyModel

END = 1
# Other alphabets than those of the tokenizers in the tests of the aligner.
TRAINED = (
    "Η απάντηση είναι 1.234,5 και όχι 0x7F. उत्तर ४२ है। 정답은 42입니다. ∑∫≤ → ∞ ½ ﬁ ① Å K̂ \t\n\n"
)
KINDS = ("bpe", "digits", "metaspace")
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
def tokens(kind: str) -> TokenBytes:
    return TokenBytes(make(kind, TRAINED, 360), kind, [END])


@cache
def aligner(student: str, teacher: str) -> Aligner:
    return Aligner(tokens(student), tokens(teacher), [END])


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


@pytest.mark.parametrize(
    ("change", "text", "at"),
    [
        (normalizers.StripAccents(), "cafe\u0301 x", 4),
        (normalizers.Replace("—", "-"), "é — b", 3),
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


@pytest.mark.parametrize("change", [normalizers.Lowercase(), normalizers.Strip()])
def test_a_normaliser_of_ascii_is_refused(change: Any) -> None:
    made = Tokenizer.from_str(make("bpe", TRAINED, 360).backend_tokenizer.to_str())
    made.normalizer = change
    found = Aligner(tokens("digits"), TokenBytes(wrapped(made), "t", [END]), [END])
    with pytest.raises(ConfigurationError, match=r"must write what the .* first different at byte"):
        found.refuse_changed_text()


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
