"""Prompts are encoded when they are drawn; a sample of them is checked before the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_lightning.errors import BadRow, ConfigurationError, TrainingStopped
from kdrl_lightning.prompts import MixedPrompts, PromptSource, encode_all
from kdrl_lightning.prompts.base import first_of_each_kind
from kdrl_lightning.prompts.prompt_set import (
    CHECKED_ROWS,
    PromptRules,
    PromptSet,
    check_ids,
    sample_rows,
)
from kdrl_lightning.tiny.models import make_tokenizer

TOKENIZER = make_tokenizer()


class Numbers(PromptSource):
    """Counts the rows that are read; some are something else."""

    def __init__(self, size: int, other: Mapping[int, Any] | None = None) -> None:
        self.size, self.other = size, other or {}
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        found = self.other.get(index, {"prompt": f"{index}="})
        if isinstance(found, Exception):
            raise found
        return found


def prompts_of(source: Any, **rules: Any) -> PromptSet:
    return PromptSet(source, "train_prompts", TOKENIZER, PromptRules(**rules))


@given(st.integers(1, 10**9), st.integers(0, 200), st.integers(0, 3))
def test_a_sample_has_first_and_last_and_no_row_twice(count: int, most: int, seed: int) -> None:
    rows = sample_rows(count, most, seed)
    assert len(set(rows)) == len(rows) == min(count, most + 2)
    assert rows == sorted(rows) and rows[0] == 0 and rows[-1] == count - 1
    assert rows == sample_rows(count, most, seed)


def test_samples_of_other_seeds_are_others() -> None:
    assert sample_rows(10**6, 100, 0) != sample_rows(10**6, 100, 1)


def test_a_small_source_is_encoded_once_and_kept() -> None:
    source = Numbers(CHECKED_ROWS + 2)
    prompts = prompts_of(source)
    assert prompts.whole and len(prompts) == CHECKED_ROWS + 2
    assert list(prompts) == encode_all(Numbers(CHECKED_ROWS + 2), "n", TOKENIZER)
    assert source.read == list(range(CHECKED_ROWS + 2))


def test_a_large_source_is_read_where_it_is_drawn() -> None:
    source = Numbers(10**6)
    prompts = prompts_of(source)
    assert not prompts.whole and len(prompts) == 10**6
    assert source.read == sample_rows(10**6, CHECKED_ROWS, 0)
    del source.read[:]
    assert prompts[123_456] == ({"prompt": "123456="}, [3, 4, 5, 6, 7, 8, 13])
    assert source.read == [123_456]


BAD: dict[str, tuple[Any, str]] = {
    "no prompt": ({"q": "1"}, r"a prompt row must have the column `prompt`: got \['q'\]"),
    "missing": ({"prompt": float("nan")}, r"must be a string or a list of chat messages: got nan"),
    "no row": ("1=", r"a row must be a mapping of columns: got '1='"),
    "unreadable": (OSError("disk\ngone"), r"it must be readable: got OSError: disk gone\."),
}


@pytest.mark.parametrize(("found", "words"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("size", [9, 10**6])
def test_a_bad_row_is_named_by_number_and_source(found: Any, words: str, size: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"^row 8 of `train_prompts`: .*{words}"):
        checked = sample_rows(size, CHECKED_ROWS, 0)
        source = Numbers(size, {8 if size == 9 else checked[8]: found})
        try:
            prompts_of(source)
        except ConfigurationError as error:
            assert "\n" not in str(error)
            raise type(error)(str(error).replace(f"row {checked[8]} ", "row 8 ")) from error


@pytest.mark.parametrize(("found", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_later_is_one_to_skip(found: Any, words: str) -> None:
    later = next(i for i in range(10**6) if i not in sample_rows(10**6, CHECKED_ROWS, 0))
    prompts = prompts_of(Numbers(10**6, {later: found}))
    with pytest.raises(BadRow, match=rf"^row {later} of `train_prompts`: .*{words}") as caught:
        prompts[later]
    assert not caught.value.wished


def test_long_rows_later_stop_the_run_or_are_left_out() -> None:
    source = Numbers(10**6, {1: {"prompt": "1" * 9}})  # row 1 is not in the sample
    assert 1 not in sample_rows(10**6, CHECKED_ROWS, 0)
    rules = {"limit": 8, "why": "context 8"}
    words = r"^row 1 of `train_prompts` has 9 tokens, above 8 \(context 8\)\."
    with pytest.raises(TrainingStopped, match=words + " Set `overlong_prompts: drop`"):
        prompts_of(source, **rules)[1]
    with pytest.raises(BadRow, match=words) as caught:
        prompts_of(source, **rules, drop=True)[1]
    assert caught.value.wished
    later = prompts_of(source)
    assert len(later[1][1]) == 9
    later.limit(8, "`max_tokens_per_micro_batch`")
    with pytest.raises(TrainingStopped, match=r"above 8 \(`max_tokens_per_micro_batch`\)"):
        later[1]


def test_long_rows_of_a_sample_are_counted() -> None:
    rows = Numbers(10**6)  # six digits and the sign are too long
    short = [i for i in sample_rows(10**6, CHECKED_ROWS, 0) if i < 10**5]
    prompts = prompts_of(rows, limit=6, drop=True)
    assert [row["prompt"] for row, _ in prompts.sample] == [f"{i}=" for i in short]
    assert prompts.longest == 6 and prompts.checked == 1002
    assert prompts.left_out() == (
        f"train_prompts: {1002 - len(short)} of 1002 checked prompts (of 1000000) have more than "
        "6 tokens; the run leaves such prompts out when it draws them"
    )
    words = (
        rf"^`train_prompts` must have at most 6 tokens a prompt \(why\): got 7 in row \d+ "
        rf"\(above the limit: {1002 - len(short)} of 1002 checked, in 1000000 rows\)\. "
        r"Set `overlong_prompts: drop`"
    )
    with pytest.raises(ConfigurationError, match=words):
        prompts_of(rows, limit=6, why="why")


def test_what_else_asks_for_rows_is_asked_at_once_and_later() -> None:
    def refuse(row: Mapping[str, Any]) -> None:
        if row["prompt"] == "1=":
            raise ConfigurationError("not this one.")

    with pytest.raises(ConfigurationError, match=r"^row 1 of `train_prompts`: not this one\.$"):
        prompts_of(Numbers(3)).require(refuse)
    large = prompts_of(Numbers(10**6))
    large.require(refuse)
    assert large[2][1] == [4, 13]
    with pytest.raises(BadRow, match=r"^row 1 of `train_prompts`: not this one\.$"):
        large[1]


def test_a_token_beyond_an_embedding_is_named() -> None:
    words = (
        r"^row 0 of `train_prompts`: every token must have one of the 13 rows of the teacher's "
        r"embedding: got the token '=', id 13\. Use the model's original tokenizer"
    )
    with pytest.raises(ConfigurationError, match=words):
        prompts_of(Numbers(3), vocabularies={"student": 14, "teacher": 13})
    check_ids([], 0, "student", TOKENIZER)
    check_ids([13], 14, "student", TOKENIZER)


def test_kinds_of_rows_are_bounded() -> None:
    rows = [{"prompt": "1", "source": str(i)} for i in range(20_000)]
    kinds = first_of_each_kind(rows)
    assert len(kinds) == len({row["source"] for row in kinds}) == 50
    assert kinds == first_of_each_kind(rows)
    assert first_of_each_kind(rows[:50]) == rows[:50]


def test_no_rows_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^`train_prompts` must have at least one"):
        prompts_of([])


def test_a_row_of_a_mixture_is_named_by_its_source_too() -> None:
    mixture = MixedPrompts({"good": Numbers(3), "other": Numbers(3, {2: {"prompt": None}})})
    number = next(i for i in range(6) if mixture[i]["prompt"] is None)
    words = rf"^row {number} of `train_prompts` \(row 2 of its source other\): a prompt must be a"
    with pytest.raises(ConfigurationError, match=words):
        prompts_of(mixture)


def test_rows_to_try_are_named_too() -> None:
    def refuse(row: Mapping[str, Any]) -> None:
        tried.append(row["prompt"])
        if row["prompt"] == "1=":
            raise ConfigurationError("no.")

    tried: list[str] = []
    prompts = prompts_of(Numbers(3))
    with pytest.raises(ConfigurationError, match=r"^row 1 of `train_prompts`: no\.$"):
        prompts.ask(refuse, [prompts[1][0], {"prompt": "0="}])
    assert tried == ["1="]
    row = {"prompt": "2="}
    prompts_of([row] * 5).ask(refuse, [row])
    assert tried == ["1=", "2="]
