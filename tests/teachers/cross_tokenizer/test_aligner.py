"""Alignment of two tokenizers: bytes, chunks, special tokens, and what is refused."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from helpers.small_tokenizers import KINDS, TEXT, by_hand, make, wrapped
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.teachers.cross_tokenizer import Aligner, Chunked, TextEncoder, TokenBytes
from kdrl_lightning.teachers.cross_tokenizer.chunks import cut
from kdrl_lightning.teachers.cross_tokenizer.segments import Cutter
from kdrl_lightning.teachers.cross_tokenizer.words import BOUNDARY, writes_words_alone

END = 1
tokenizer = cache(make)


def tokens(kind: str) -> TokenBytes:
    return TokenBytes(tokenizer(kind), kind, [END])


@cache
def aligner(student: str, teacher: str, words: bool = True) -> Aligner:
    made = Aligner(tokens(student), tokens(teacher), [END])
    made.segments.words &= words
    return made


def row(found: Aligner, ids: list[int], end: int = END) -> Chunked:
    """Align one completion, in a batch with others that must not matter."""
    first, one, last = found([np.array([END]), np.array(ids), np.array(ids)], [end] * 3)
    assert first.places.tolist() == [0] and np.array_equal(one.columns, last.columns)
    assert np.array_equal(one.places, last.places) and first.teacher_ids.tolist() == [end]
    return one


def walk(ours: list[bytes], theirs: list[bytes]) -> list[tuple[int, int]]:
    """Sizes of the chunks of two lists of pieces, found by stepping on the side that is behind."""
    out, s, t, a, b, start, other = [], 0, 0, 0, 0, 0, 0
    while s < len(ours) or t < len(theirs):
        if a <= b and s < len(ours):
            a, s = a + len(ours[s]), s + 1
        else:
            b, t = b + len(theirs[t]), t + 1
        if a == b:
            out.append((s - start, t - other))
            start, other = s, t
    return out


def sizes(one: Chunked) -> list[tuple[int, int]]:
    """Sizes of the chunks that an alignment has, on both sides."""
    starts = [i for i, p in enumerate(one.places) if p == 0]
    stops = [*starts[1:], len(one.places)]
    theirs = [i for i, p in enumerate(one.teacher_places) if p == 0]
    assert [int(one.columns[i]) for i in starts] == theirs
    after = [*theirs[1:], len(one.teacher_ids)]
    ours = [b - a for a, b in zip(starts, stops, strict=True)]
    return list(zip(ours, [b - a for a, b in zip(theirs, after, strict=True)], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(text=st.one_of(st.text(st.sampled_from(TEXT), max_size=30), st.text(max_size=12)))
def test_tokens_write_the_bytes_of_a_text(kind: str, text: str) -> None:
    """The map is the tokenizer's own: its decoder writes the same text, up to a first space."""
    ids = tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
    known = tokens(kind)
    if all(known.pieces[i] is not None for i in ids) and kind != "wordpiece":
        written = known.text(ids).decode(errors="replace")
        plain = tokenizer(kind).decode(ids, clean_up_tokenization_spaces=False)
        assert written in (plain, " " + plain)


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(KINDS, 2)))
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_chunks_are_minimal_and_cover_the_same_bytes(
    student: str, teacher: str, data: st.DataObject
) -> None:
    """Any ids that a student can sample, half characters included, against a slow walk."""
    found = aligner(student, teacher)
    plain = np.flatnonzero(found.student.plain)
    ids = data.draw(st.lists(st.sampled_from(plain.tolist()), max_size=12))
    ended = data.draw(st.booleans())
    one = row(found, [*ids, END] if ended else ids or [END])
    ours = [found.student.pieces[i] or b"" for i in ids]
    text = b"".join(ours)
    # To sentencepiece this character is a space.
    if teacher in KINDS[:4] or (teacher in KINDS[4:6] and "▁".encode() not in text):
        assert one.differs_at is None
    if one.differs_at is None:
        theirs = [found.teacher.pieces[i] for i in one.teacher_ids]
        closed = ended or not ids
        body = theirs[: len(theirs) - closed]
        assert b"".join(body) == text  # type: ignore[arg-type]
        assert sizes(one) == walk(ours, body) + [(1, 1)] * closed  # type: ignore[arg-type]
        return
    # What the teacher cannot write is cut off at the first byte that differs.
    kept = b"".join(found.teacher.pieces[i] or b"" for i in one.teacher_ids[one.teacher_ids != END])
    assert text.startswith(kept) and len(kept) <= one.differs_at < len(text)
    scored = int((one.places >= 0).sum())
    assert sum(map(len, ours[:scored])) <= one.differs_at
    assert (one.places[scored:] == -1).all()


@pytest.mark.parametrize("teacher", KINDS[:4])
@pytest.mark.parametrize(
    "text",
    [
        " leading space", "two  spaces\n\n\ttab", "12345.678", "e\u0301 is not é", "مرحبا بالعالم",
        "👨‍👩‍👧👍🏽", "שלום\u200f!", "\ufeff\u00a0x", "<eos> and <|im_end|>", "▁x",
    ],
)  # fmt: skip
def test_byte_level_teachers_read_every_text(teacher: str, text: str) -> None:
    found = aligner("bytes", teacher)
    one = row(found, [*TextEncoder(found.student)([text.encode()])[0], END])
    assert one.differs_at is None and (one.places >= 0).all()
    assert found.teacher.text(one.teacher_ids[:-1].tolist()) == text.encode()
    assert one.teacher_ids[-1] == END and END not in one.teacher_ids[:-1]


PROSE = [
    *"""The answer's 12 + 345 = 357 , isn't it ? (no) "so" 's _x --y Größe 数学 🙂 ok\n\n\t """,
    " ",
]


@pytest.mark.parametrize(("student", "teacher"), [*zip(KINDS, KINDS[3:] + KINDS[:3], strict=True)])
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_words_that_are_aligned_once_have_the_chunks_of_the_whole_text(
    student: str, teacher: str, data: st.DataObject
) -> None:
    """Equal words of different rows share one result; special and broken tokens stand between."""
    fast, slow = aligner(student, teacher), aligner(student, teacher, words=False)
    texts = data.draw(
        st.lists(st.text(st.sampled_from(PROSE), max_size=40), min_size=1, max_size=3)
    )
    odd = [0, END, 2, len(fast.student.pieces) + 5]
    rows = []
    for text, ids in zip(
        texts, TextEncoder(fast.student)([t.encode() for t in texts]), strict=True
    ):
        more = data.draw(st.lists(st.sampled_from(odd), max_size=1))
        rows.append(np.array([*ids, *more, *ids[: len(text) // 2], *ids, END], np.int64))
    rows = [np.maximum(row, 0) for row in rows]
    most = data.draw(st.lists(st.integers(0, 60), min_size=len(rows), max_size=len(rows)))
    for limits in None, most:
        ends = [END] * len(rows)
        for one, other in zip(fast(rows, ends, limits), slow(rows, ends, limits), strict=True):
            for name in ("teacher_ids", "teacher_places", "places", "columns", "differs_at"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_a_tokenizer_whose_words_depend_on_each_other_reads_whole_texts() -> None:
    """A token over a space, a pre-tokenizer that takes two words, a normaliser of a text's ends."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pairs = pre_tokenizers.Split(Regex("[A-Za-z]+ [A-Za-z]+|."), "isolated")
    found = {}
    for name in ("plain", "across", "pairs", "strip"):
        made = Tokenizer.from_str(tokenizer("bpe").backend_tokenizer.to_str())
        if name == "across":
            made = by_hand([*"abĠ", "aĠ"], [("a", "Ġ")]).backend_tokenizer
        if name == "pairs":
            made.pre_tokenizer = pre_tokenizers.Sequence([pairs, level])
        if name == "strip":
            made.normalizer = normalizers.Strip()
        known = TokenBytes(wrapped(made), name, [END])
        found[name] = writes_words_alone(known, TextEncoder(known))
    assert found == {"plain": True, "across": False, "pairs": False, "strip": False}
    words = [kind for kind in KINDS if aligner("bytes", kind).segments.words]
    assert words == [kind for kind in KINDS if kind != "sentencepiece"]  # merges over spaces


def test_a_token_over_a_space_is_seen_in_the_vocabulary() -> None:
    """No tried text has a q, so only the token itself shows that a word depends on the next one."""
    merges = [("q", "Ġ"), ("Ġ", "a"), ("qĠ", "a")]
    crossing = by_hand([*"abqĠ", "qĠ", "Ġa", "qĠa"], merges)
    known = TokenBytes(crossing, "t", [END])
    assert not writes_words_alone(known, TextEncoder(known))
    found = Aligner(TokenBytes(by_hand("abqĠ"), "s", [END]), known, [END])
    got = row(found, [4, 5, 2, 3, 5, 2, END])  # q| |a|b| |a
    assert [known.pieces[i] for i in got.teacher_ids[:-1]] == [b"q a", b"b", b" a"]
    assert got.places.tolist() == [0, 1, 2, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a   b a", ["a", "  ", " b", " a"]),  # a run of spaces is one word's
        ("a\n  b a", ["a", "\n ", " b", " a"]),
        ("é a b", ["é", " a", " b"]),  # not after other characters than ASCII
        ("a é a", ["a", " é", " a"]),
    ],
)
def test_words_are_cut_before_single_spaces_between_ascii(text: str, expected: list[str]) -> None:
    """GPT-2's words: of several spaces only the last one belongs to the next word."""
    made = make("bpe", "a   b\n  é " * 50, 300)
    known = TokenBytes(made, "t", [END])
    found = Aligner(tokens("bytes"), known, [END])
    assert found.segments.words
    ids = TextEncoder(found.student)([text.encode()])[0]
    pieces = [known.pieces[i] for i in row(found, ids).teacher_ids]
    assert pieces == [one.encode() for one in expected]
    cuts = found.segments(np.array(ids), np.array([len(ids)])).starts[1:]
    at = np.append(0, np.cumsum(found.student.lengths[ids]))[cuts].tolist()
    assert at == [m.start() for m in BOUNDARY.finditer(text.encode())]


def test_segments_with_one_hash_are_told_apart() -> None:
    cutter = Cutter(tokens("bytes"), True)
    cutter._marks[:] = 1  # every segment of one length has one hash
    ids = np.array(TextEncoder(tokens("bytes"))([b"ab cd ab ef"])[0])
    found = cutter(ids, np.array([len(ids)]))
    assert found.starts.tolist() == [0, 2, 5, 8] and found.which.tolist() == [0, 1, 2, 3]
    found = Cutter(tokens("bytes"), True)(np.append(ids, ids), np.array([len(ids)] * 2))
    assert len(found.examples) == 4 and found.which[4] == found.which[0]


def test_half_characters_become_single_bytes() -> None:
    found = aligner("bytes", "sentencepiece")
    half = "🙂".encode()[:2]
    ids = [i for b in b"ab" + half for i in TextEncoder(found.student)([bytes([b])])[0]]
    one = row(found, ids)
    assert found.teacher.text(one.teacher_ids.tolist()) == b"ab" + half
    assert (one.places >= 0).all()


def test_a_special_token_is_a_chunk_if_the_teacher_has_it() -> None:
    student, teacher = by_hand("ab"), by_hand(["a", "b", "ab"], [("a", "b")])
    for one in student, teacher:
        one.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    student.add_special_tokens({"additional_special_tokens": ["<tool>", "<mine>"]})
    found = Aligner(TokenBytes(student, "s", [END]), TokenBytes(teacher, "t", [END]), [END])
    tool, mine = student.convert_tokens_to_ids(["<tool>", "<mine>"])
    got = row(found, [2, 3, tool, 2, 3, END])
    theirs = teacher.convert_tokens_to_ids("<tool>")
    assert got.teacher_ids.tolist() == [4, theirs, 4, END]
    assert got.places.tolist() == [0, 1, 0, 0, 1, 0]
    # After a token that the teacher does not have it would read another text.
    got = row(found, [2, 3, mine, 2, 3, END])
    assert got.teacher_ids.tolist() == [4] and got.places.tolist() == [0, 1, -1, -1, -1, -1]
    # An id without a token, such as a padding row of the embedding.
    assert row(found, [2, 999, END]).places.tolist() == [0, -1, -1]
    assert row(found, [999, END]).places.tolist() == [-1, -1]


def test_the_end_token_becomes_the_teachers() -> None:
    found = Aligner(
        TokenBytes(by_hand("ab"), "s", [END]), TokenBytes(by_hand("ab"), "t", [0]), [END]
    )
    assert row(found, [2, END], end=0).teacher_ids.tolist() == [2, 0]
    assert row(found, [2, 3], end=0).teacher_ids.tolist() == [2, 3]  # cut: no end


def test_long_chunks_and_a_full_context_have_no_score() -> None:
    merged = by_hand([*"abc", "ab", "abc"], [("a", "b"), ("ab", "c")])
    pair = TokenBytes(by_hand("abc"), "s", [END]), TokenBytes(merged, "t", [END])
    ids = np.array([2, 3, 4, 2, END])  # abc a <eos>
    assert row(Aligner(*pair, [END], 2), ids.tolist()).places.tolist() == [-1, -1, -1, 0, 0]
    assert row(Aligner(*pair, [END], 3), ids.tolist()).places.tolist() == [0, 1, 2, 0, 0]
    one, two = Aligner(*pair, [END])([ids, ids], [END, END], [2, 0])
    assert one.places.tolist() == [0, 1, 2, 0, -1] and one.teacher_ids.tolist() == [6, 2]
    assert two.places.tolist() == [-1] * 5 and len(two.teacher_ids) == 1


@pytest.mark.parametrize(
    ("limit", "places"),
    [
        (5, [0, 0, 0]),
        (4, [0, 0, -1]),
        (3, [0, -1, -1]),  # the second chunk begins within the context, and ends after it
        (2, [0, -1, -1]),
        (1, [0, -1, -1]),
        (0, [-1, -1, -1]),
    ],
)
def test_a_chunk_that_the_context_cuts_has_no_score(limit: int, places: list[int]) -> None:
    """``a|abc`` and the end, whose teacher writes letters: 1, 3 and 1 tokens."""
    merged = by_hand([*"abc", "ab", "abc"], [("a", "b"), ("ab", "c")])
    found = Aligner(TokenBytes(merged, "s", [END]), TokenBytes(by_hand("abc"), "t", [END]), [END])
    (one,) = found([np.array([2, 6, END])], [END], [limit])
    assert one.places.tolist() == places
    assert one.columns.tolist() == [c * (p >= 0) for c, p in zip([0, 1, 4], places, strict=True)]
    assert one.teacher_ids.tolist() == ([2, 2, 3, 4, END][:limit] or [END])


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_the_name_of_the_unknown_token_is_text(kind: str) -> None:
    found = tokens(kind)
    (ids,) = TextEncoder(found)([b"a<unk>b"])
    assert b"".join(found.pieces[i] for i in ids) == b"a<unk>b"
    assert tokenizer(kind).convert_tokens_to_ids("<unk>") not in ids


def test_a_token_without_bytes_belongs_to_the_chunk_before_it() -> None:
    rows = np.array([3, 0, 1]), np.array([2, 0, 2])
    ours, theirs = cut(np.array([1, 0, 1, 2]), rows[0], np.array([1, 1, 1, 1]), rows[1])
    assert ours.places.tolist() == [0, 1, 0, 0] and ours.numbers.tolist() == [0, 0, 1, 0]
    assert theirs.places.tolist() == [0, 0, 0, 1] and theirs.whole.all()


def test_an_empty_batch_has_no_rows() -> None:
    assert aligner("bytes", "bpe")([], []) == []


def changed(normalizer: Any) -> Any:
    made = Tokenizer.from_str(by_hand([*"abcAB "]).backend_tokenizer.to_str())
    made.normalizer = normalizer
    return wrapped(made)


def refuse(student: TokenBytes, teacher: Any) -> None:
    Aligner(student, TokenBytes(teacher, "t", [END]), [END]).refuse_changed_text()


def test_a_teacher_that_changes_text_is_refused_with_the_first_byte() -> None:
    student = TokenBytes(by_hand([*"abAB"]), "s", [END])
    with pytest.raises(ConfigurationError, match="got b'a' of t for b'A' of s, first different at"):
        refuse(student, changed(normalizers.Lowercase()))
    with pytest.raises(ConfigurationError, match="must write what the student writes: got b''"):
        refuse(student, by_hand("ab"))
    refuse(student, by_hand([*"abABĠ"]))


class NoBackend:
    pass


def test_tokenizers_without_a_map_to_bytes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"a `tokenizers` backend.*got NoBackend"):
        TokenBytes(NoBackend(), "x")
    made = Tokenizer(models.WordPiece({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    for decoder, found in (decoders.WordPiece(), "WordPiece"), (decoders.CTC(), "CTC"):
        made.decoder = decoder
        with pytest.raises(ConfigurationError, match=f"keeps every byte .*got {found}, which los"):
            TokenBytes(wrapped(made, pad_token=None), "x")
