"""The rules for values, without a command line: shapes, lists, words, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import pytest
import yaml

from kdrl_lightning.cli.parser import is_file, one_line
from kdrl_lightning.cli.settings import private
from kdrl_lightning.cli.settings.classes import check_spec
from kdrl_lightning.cli.settings.layers.merging import merge
from kdrl_lightning.cli.settings.layers.replaced import Given, contents, missing
from kdrl_lightning.cli.settings.private import util
from kdrl_lightning.cli.settings.shapes import by_name, fits, fitting, is_class, is_spec
from kdrl_lightning.cli.settings.text import Text, dump, load, plain
from kdrl_lightning.cli.settings.unused import note_dropped, take_notes
from kdrl_lightning.errors import path_error
from kdrl_lightning.prompts import PromptSource

ROWS = Sequence[Mapping[str, Any]]
SPEC = {"class_path": "JSONLPrompts", "init_args": {"path": "x"}}
ARGUMENT = util.NestedArg(key="path", val="x")


@pytest.mark.parametrize(
    ("val", "previous", "wanted"),
    [
        (SPEC, None, [PromptSource]),
        ([{"prompt": "x"}], None, [ROWS]),
        ({"a": {"prompts": "x"}}, None, [dict[str, Any]]),
        ({"path": "x"}, SPEC, [PromptSource]),
        ({"a": {"b": 1}}, SPEC, [dict[str, Any]]),
        (ARGUMENT, SPEC, [PromptSource]),
        (ARGUMENT, None, [PromptSource, dict[str, Any]]),
        (ARGUMENT, [SPEC], [PromptSource, dict[str, Any]]),
        (None, None, [NoneType]),
        ("null", None, [PromptSource, NoneType]),
        (Text("null"), None, [PromptSource]),
        ("JSONLPrompts", None, [PromptSource]),
    ],
)
def test_a_shape_tells_the_type(val: Any, previous: Any, wanted: list[Any]) -> None:
    members = [PromptSource, ROWS, dict[str, Any], NoneType]
    assert fitting(members, val, previous, None) == wanted


def test_a_shape_that_fits_nothing_leaves_all() -> None:
    assert fitting([PromptSource, NoneType], 3, None, None) == [PromptSource, NoneType]
    assert fitting([str, int], 3, None, "3") == [str, int]
    assert fitting([str, list[int]], [3], None, "[3]") == [str, list[int]]
    assert fits(Any, [1], None) and fits(Literal["a"], True, None) and not fits(ROWS, 1.5, None)


def test_a_spec_is_a_class_path_with_its_arguments() -> None:
    assert is_spec(SPEC) and is_spec({"init_args": {}})
    assert not is_spec({**SPEC, "class_name": "x"}) and not is_spec({"dict_kwargs": {}})
    assert by_name({"a": {}, "b": {}}) and not by_name({}) and not by_name({"a": {}, "b": 1})
    assert is_class(Callable[[int], int]) and not is_class(str) and not is_class(ROWS)


def test_what_is_written_is_the_same_for_every_reader_of_yaml() -> None:
    for text in ("=", "2026-01-01", "1e5", "007", "yes", "<<", "a: b", "é\x85x", "1:30"):
        written = dump({"x": text, "y": Text(text)})
        assert load(written) == yaml.safe_load(written) == {"x": text, "y": text}
    assert yaml.safe_load(dump([1e-6, 1e22, 3, None, True])) == [1e-6, 1e22, 3, None, True]


def test_a_component_receives_plain_strings() -> None:
    given = plain({"a": [Text("x"), (Text("y"),)]})
    assert type(given["a"][0]) is str and type(given["a"][1][0]) is str


def test_the_classes_of_a_list_are_compared_one_by_one() -> None:
    had = contents(["a.B", {"class_path": "B", "init_args": {"x": 1, "y": 2}}, "columns", 3])
    assert had == [Given("B", ()), Given("B", ("x", "y"))]
    one = [Given("B", ("x",))]
    assert missing(had, one) == ["B"] and missing(had[1:], one) == ["`y` of B"]
    assert missing(had, had) == [] and missing(had, []) == ["B", "B"]
    assert contents("columns") is None and contents(None) is None and contents(3) is None
    assert contents({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("base", "over", "lost"),
    [
        (["CPUThreads"], ["StepProfile"], "CPUThreads has"),
        ([{"class_path": "a.B"}, "C"], [{"class_path": "C"}], "B has"),
        (["A", "B", "C"], ["B"], "A, C have"),
        (["B", "B"], ["B"], "B has"),
        ([{"class_path": "B", "init_args": {"x": 1}}], ["B"], "`x` of B has"),
        ([{"class_path": "B"}], {"class_path": "C"}, "B has"),
        ({"class_path": "B"}, ["C"], "B has"),
        (["q_proj", "v_proj"], ["k_proj"], None),
        ([1, 2], [3], None),
        (["B"], None, None),
        (["B"], ["B", "C"], None),
    ],
)
def test_a_list_of_a_base(base: Any, over: Any, lost: str | None) -> None:
    take_notes()
    assert merge({"x": base}, {"x": over}) == {"x": over}
    words = (
        f"`x` replaces the list of its base, so {lost} no effect. Write `x+` to add to the list."
    )
    assert take_notes() == ([] if lost is None else [words])


def test_notes_are_given_once() -> None:
    take_notes()
    for _ in range(2):
        note_dropped("model.objective", ["x", "y"], "a.B", "c.D")
        note_dropped("", [], "a.B", "c.D")
    words = "`model.objective`: D replaces B, so `x`, `y` of B has no effect."
    assert take_notes() == [words] and take_notes() == []


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "Parser key \"a.b\":\n  Expected a <class 'float'>. Got value: x",
            "`a.b` must be a number: got x.",
        ),
        ("Parser key a element 2: Parser key b: c", "`a.b`: c"),
        ('Parser key "a": `b` must be c', "`a.b` must be c"),
        ("`b` must be c", "`b` must be c"),
        ("no key\n here", "no key here"),
        (
            "Parser key a: Expected a <class 'str'>. Got value: 7",
            "`a` must be text: got 7. Quote it.",
        ),
    ],
)
def test_a_message_is_one_line_with_one_key(message: str, line: str) -> None:
    assert one_line(message) == line


def test_a_text_that_can_be_no_path_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert is_file(str(tmp_path / "x"))
    assert not any(is_file(name) for name in ("a\0b", "x" * 5000, str(tmp_path), ""))


def test_a_path_that_cannot_be_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    for name, words in (("x/y", "Not a directory"), ("y" * 300, "name too long"), ("\0", "null")):
        with pytest.raises((OSError, ValueError)) as raised:
            (tmp_path / name).open("w")
        error = RuntimeError()
        error.__cause__ = raised.value
        assert words in str(path_error(error)) and str(path_error(error)).startswith("a path must")
    assert (
        path_error(FileNotFoundError(2, "x", "y")) is None and path_error(ValueError("x")) is None
    )


@pytest.mark.parametrize(
    ("val", "member", "words"),
    [
        (SPEC | {"path": "y"}, PromptSource, "got `path` next to `class_path`. Write it below"),
        ({"class_path": "X", "init_arg": {}}, PromptSource, "Did you mean `init_args`?"),
        (SPEC | {"__path__": "x.yaml", "__of_jsonargparse__": 1}, PromptSource, None),
        ({"path": "y"}, PromptSource, None),
        ({"class_path": "X", "a": 1}, dict[str, Any], None),
    ],
)
def test_an_argument_beside_a_class_is_refused(val: Any, member: Any, words: str | None) -> None:
    if words is None:
        check_spec(val, [member, NoneType])
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        check_spec(val, [member, NoneType])


def test_another_jsonargparse_is_refused_in_one_line() -> None:
    for module, name in (("_typehints", "no_such_name"), ("_no_such_module", "x")):
        words = (
            f"`jsonargparse` must be {private.CHECKED}: got .*, without .*_?no_such.*pip install"
        )
        with pytest.raises(ValueError, match=words):
            private.private(module, (name,))
