"""Tokens shown as text: byte-level BPE, characters of several tokens, invisible characters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdrl_lightning.callbacks.reports import token_texts, visible
from kdrl_lightning.tiny.models import make_tokenizer

CASES = settings(derandomize=True, max_examples=80, deadline=None)


def byte_level() -> PreTrainedTokenizerFast:
    """A BPE over bytes with one merge: every character beyond ASCII is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"ab": 256}
    core = Tokenizer(models.BPE(vocab, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


BYTES = byte_level()


def ids_of(text: str) -> list[int]:
    ids: Any = BYTES(text)["input_ids"]
    return list(ids)


def test_bytes_of_a_character_stand_at_its_last_token() -> None:
    ids = [*ids_of("ab é👩‍🚀"), BYTES.eos_token_id]
    texts = token_texts(BYTES, ids)
    assert texts[:4] == ["ab", " ", "", "é"]
    assert texts[4:8] == ["", "", "", "👩"] and texts[-1] == "<end>"
    assert "Ġ" not in "".join(texts) and "Ã" not in "".join(texts)


@CASES
@given(st.text(max_size=20))
def test_the_pieces_are_the_text(text: str) -> None:
    assert "".join(token_texts(BYTES, ids_of(text))) == text


@CASES
@given(st.lists(st.integers(0, 255), max_size=30))
def test_broken_bytes_do_not_hide_what_follows(ids: list[int]) -> None:
    texts = token_texts(BYTES, [*ids, *ids_of("ab")])
    assert len(texts) == len(ids) + 1 and texts[-1].endswith("ab")


def test_no_token_waits_for_ever() -> None:
    texts = token_texts(BYTES, ids_of("é")[:1] * 12 + ids_of("x"))
    assert "".join(texts).count("\ufffd") == 12 and texts[-1].endswith("x")
    assert sum(bool(text) for text in texts[:-1]) >= 3


def test_the_tokenizer_of_the_embedded_task() -> None:
    tokenizer = make_tokenizer()
    ids = [*tokenizer("1+2=")["input_ids"], tokenizer.eos_token_id]
    assert token_texts(tokenizer, ids) == ["1", "+", "2", "=", "<eos>"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00\x1b[31m\x7f", "a␀␛[31m␡"),
        ("one\ntwo\t\r", "one↵\ntwo⇥\t␍"),
        ("\u202egnp.\u2066x\u2069", "⟨U+202E⟩gnp.⟨U+2066⟩x⟨U+2069⟩"),
        ("\u200e\u061c\u2028\x85", "⟨U+200E⟩⟨U+061C⟩⟨U+2028⟩⟨U+0085⟩"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("👩‍🚀 é שלום", "👩‍🚀 é שלום"),
    ],
)
def test_what_cannot_be_seen_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown
