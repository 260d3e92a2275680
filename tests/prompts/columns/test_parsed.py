"""Columns that hold lists and dicts as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdrl_lightning.common.written_values import read_container
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts import HFPrompts, MixedPrompts, ParsedPrompts

# Time says nothing of these laws.
settings.register_profile(
    "parsed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
LAW = settings.get_profile("parsed")
FLAT = st.lists(st.text(max_size=6) | st.integers() | st.booleans() | st.none(), min_size=1)
DEEP = st.recursive(
    FLAT, lambda inner: st.lists(inner, min_size=1) | st.dictionaries(st.text(), inner, min_size=1)
)


@LAW
@given(DEEP)
def test_json_and_repr_of_any_list_are_read(value: Any) -> None:
    assert read_container(json.dumps(value)) == value
    assert read_container(f" {value!r}\n") == value


@LAW
@given(st.lists(st.text(st.characters(codec="ascii"), max_size=6), min_size=1, max_size=30))
def test_what_numpy_prints_is_read(texts: list[str]) -> None:
    array = np.array(texts, dtype=object)
    assert read_container(str(array)) == texts
    assert read_container(repr(array)) == texts


@LAW
@given(st.text(st.sampled_from("[](){}'\",: 1a\\\n=.n-"), max_size=12))
def test_any_text_is_read_as_python_does_or_not_at_all(text: str) -> None:
    found = read_container(text)
    assert found is None or (isinstance(found, list | dict) and found)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[72 73]", [72, 73]),
        ("[1.  2.5]", [1.0, 2.5]),
        ("[1.50, 007, +5, 1e5]", ["1.50", "007", "+5", "1e5"]),
        ("tensor([1, 2], dtype=torch.int32)", [1, 2]),
        ("[np.int64(72), np.str_('a')]", [72, "a"]),
        ("[{'a': 1}\n {'a': 2}]", [{"a": 1}, {"a": 2}]),
        ("['x', nan]", ["x", None]),
        ("(72,)", [72]),
        (r'["\ud83d\ude00", "a\/b"]', ["😀", "a/b"]),
    ],
)
def test_values_of_a_written_list(text: str, value: Any) -> None:
    assert read_container(text) == value


NONE = ["(72)", "[x]", "[0, 1)", "[]", "f(1)", "x[1]", "[1] + [2]", "[1,,2]", "(1 2)", "{1 2}"]
NONE += ["[", "[1/2]", "array([1]", "array(5)", "{'a': 1, 'b'}", "['a", "[1:2]"]


@pytest.mark.parametrize(
    "text",
    [*NONE, pytest.param("[" * 9999 + "]" * 9999, id="deep")],
)
def test_other_texts_are_none(text: str) -> None:
    assert read_container(text) is None


def test_an_entry_of_a_dict_becomes_the_answer(tmp_path: Path, own_cache: Any) -> None:
    cells = ['"{""ground_truth"": ""[\'72\', \'73\']"", ""style"": ""rule""}"', "5"]
    (tmp_path / "x.csv").write_text("prompt,answer,note\n" + "".join(f"q,{c},[1]\n" for c in cells))
    source = HFPrompts(str(tmp_path / "x.csv"))
    rows = ParsedPrompts(source, columns=["answer.ground_truth"])
    assert (rows[0]["answer"], rows[0]["note"], len(rows)) == (["72", "73"], "[1]", 2)
    words = "^`columns` must name entries that a row has: got answer.ground_truth for '5'"
    with pytest.raises(ConfigurationError, match=words):
        _ = rows[1]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("answer", "^`columns` must be a list of columns other than `prompt`: got 'answer'"),
        ([], r"^`columns` must be a list of columns other than `prompt`: got \[\]"),
        (["prompt"], "^`columns` must be a list of columns other than `prompt`: got"),
        (["answers"], "^`columns` must be columns of the rows: got answers. The row has prompt, a"),
    ],
)
def test_columns_that_are_not_there(columns: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ParsedPrompts([{"prompt": "q", "answer": "5"}], columns=columns)


def test_a_row_is_named_by_its_own_source() -> None:
    mixed = MixedPrompts({"a": [{"prompt": "q", "answer": "[1]"}]})
    parsed = ParsedPrompts(mixed, columns=["answer"])
    assert (parsed[0]["answer"], parsed.where(0)) == ([1], mixed.where(0))
    assert ParsedPrompts([{"prompt": "q", "a.b": "[1]"}], columns=["a.b"])[0]["a.b"] == [1]
    assert ParsedPrompts([{"a": 1}], columns=["a"]).where(0) == ""
