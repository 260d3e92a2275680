"""The tokenizer of single characters encodes and decodes without loss."""

from __future__ import annotations

import pytest
from transformers import Qwen2Tokenizer

from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.tiny.addition import SYMBOLS, AdditionTraces
from kdrl_lightning.tiny.models import make_tokenizer


@pytest.fixture(scope="module", params=["made", "saved and loaded"])
def tokenizer(request, student_folder):
    return make_tokenizer() if request.param == "made" else load_tokenizer(student_folder)


def test_vocabulary_is_two_special_tokens_and_the_symbols(tokenizer):
    expected = ["<pad>", "<eos>", *SYMBOLS]
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(expected)}
    assert len(tokenizer) == 16
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_it_is_what_transformers_makes_of_a_qwen2_folder(tokenizer):
    assert type(tokenizer) is Qwen2Tokenizer


def test_there_is_no_unknown_token_other_characters_are_left_out(tokenizer):
    assert tokenizer.unk_token_id is None
    assert tokenizer("why?")["input_ids"] == []
    assert tokenizer("a1 +\n2ß")["input_ids"] == [3, 12, 4]


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_every_symbol_is_one_token(tokenizer, symbol):
    assert tokenizer(symbol)["input_ids"] == [2 + SYMBOLS.index(symbol)]
    assert tokenizer.decode([2 + SYMBOLS.index(symbol)]) == symbol


def test_all_symbols_together_survive(tokenizer):
    ids = tokenizer(SYMBOLS)["input_ids"]
    assert ids == list(range(2, 16))
    assert tokenizer.decode(ids) == SYMBOLS


def test_worked_answers_survive(tokenizer):
    for row in AdditionTraces(100, seed=4, slip=0.5):
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text


def test_prompt_and_completion_are_encoded_as_their_concatenation(tokenizer):
    row = AdditionTraces(1)[0]
    both = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
    assert both == tokenizer(row["prompt"] + row["completion"])["input_ids"]


def test_special_tokens_are_left_out_when_decoding(tokenizer):
    assert tokenizer.batch_decode([[3, 1, 0], [12, 1]], skip_special_tokens=True) == ["1", "+"]
