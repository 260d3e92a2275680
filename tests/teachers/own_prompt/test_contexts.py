"""What a teacher may see besides the prompt, completion by completion, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards.base import Verdict
from kdrl_lightning.teachers import (
    ColumnContext,
    Context,
    FeedbackContext,
    FixedContext,
    JoinedContext,
    OtherProblemContext,
    SiblingContext,
)
from kdrl_lightning.teachers.own_prompt.contexts import without_thinking
from kdrl_lightning.teachers.own_prompt.groups import Group

ROW = {"prompt": "1+1=", "answer": "2"}


def group(
    *attempts: tuple[str, float], row: dict[str, Any] | None = None, other: Any = None
) -> Group:
    made: list[Any] = [
        SimpleNamespace(row=row or ROW, text=text, verdict=Verdict(reward, reward >= 1))
        for text, reward in attempts
    ]
    return Group(made, other)


def test_the_first_other_success_is_the_context_and_never_the_own_completion() -> None:
    texts = SiblingContext().of_group(group(("a", 0.0), ("b", 1.0), ("c", 0.5), ("d", 1.5)))
    assert texts == ["b", "d", "b", "b"]


def test_the_only_success_has_no_context_and_a_group_without_one_has_none() -> None:
    assert SiblingContext().of_group(group(("a", 0.0), ("b", 1.0))) == ["b", None]
    assert SiblingContext().of_group(group(("a", 0.0), ("b", 0.9))) == [None, None]
    assert SiblingContext(0.5).of_group(group(("a", 0.0), ("b", 0.9))) == ["b", None]
    assert SiblingContext().of_group(group(("a", 1.0))) == [None]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5]), min_size=1, max_size=6))
def test_siblings_against_a_slow_reference(rewards: list[float]) -> None:
    made = group(*[(f"text {i}", reward) for i, reward in enumerate(rewards)])
    expected = []
    for i in range(len(rewards)):
        found = None
        for j in reversed(range(len(rewards))):
            if j != i and rewards[j] >= 1.0:
                found = f"text {j}"
        expected.append(found)
    assert SiblingContext().of_group(made) == expected


def test_a_siblings_thinking_is_cut_out() -> None:
    thought = group(("<think>it is 2</think>\n2", 1.0), ("x", 0.0))
    assert SiblingContext().of_group(thought) == [None, "2"]
    # One that is nothing but thinking shows no way: the next success is taken.
    cut = group(("<think>it is", 1.0), ("so</think> 2", 1.0), ("x", 0.0))
    assert SiblingContext().of_group(cut) == ["2", None, "2"]
    other = group(("[[it is 2]] 2", 1.0), ("x", 0.0))
    assert SiblingContext(thinking=["[[", "]]"]).of_group(other)[1] == "2"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no tags", "no tags"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("a</think>b <think>c</think>d", "b d"),
        ("a</think>b <think>c", "b"),
        ("<think></think>", ""),
        ("", ""),
    ],
)
def test_thinking_by_hand(text: str, left: str) -> None:
    assert without_thinking(text) == left


class NAType:
    """Like pandas' NA: neither equal nor unequal to anything."""

    def __ne__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (NAType(), None),
        ("so: 2", "so: 2"),
        (" 2\n", "2"),
        (2, "2"),
        ("", None),
        ("  ", None),
        (None, None),
        (float("nan"), None),
    ],
)
def test_a_cell_is_the_context_of_every_completion(cell: Any, text: str | None) -> None:
    made = group(("a", 0.0), ("b", 1.0), row={**ROW, "solution": cell})
    assert ColumnContext("solution").of_group(made) == [text, text]


def test_a_row_without_the_column_has_no_context() -> None:
    assert ColumnContext("solution").of_row(ROW) is None


@pytest.mark.parametrize("cell", [["a"], {"a": 1}])
def test_a_cell_that_is_no_text_is_refused(cell: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"column `solution` must hold text .*: got "):
        ColumnContext("solution").of_row({**ROW, "solution": cell})


def test_feedback_is_that_of_the_own_completion() -> None:
    made: list[Any] = [
        SimpleNamespace(row=ROW, text="", verdict=Verdict(0.0, False, feedback=said))
        for said in ("too large", "", " \n")
    ]
    assert FeedbackContext().of_group(Group(made)) == ["too large", None, None]


def test_another_problems_context_is_a_control() -> None:
    inner = ColumnContext("answer")
    context, two = OtherProblemContext(inner), (("a", 0.0), ("b", 1.0))
    other = {"prompt": "2+2=", "answer": "4"}
    assert context.of_group(group(*two, other=other)) == ["4", "4"]
    assert context.of_group(group(*two, other=dict(ROW))) == [None, None]  # the same problem
    assert context.of_group(group(*two)) == [None, None]
    assert list(context.parts()) == [context, inner] and context.reads_others


def test_joined_contexts_have_headings() -> None:
    context = JoinedContext({"Solution:": SiblingContext(), "Be": FixedContext("brief.")})
    assert context.of_group(group(("a", 0.0), ("b", 1.0))) == [
        "Solution:\nb\n\nBe\nbrief.",
        "Be\nbrief.",
    ]
    assert JoinedContext({"": FixedContext("brief.")}).of_group(group(("a", 0.0))) == ["brief."]
    none = JoinedContext({"Solution:": SiblingContext(), "Feedback:": FeedbackContext()})
    assert none.of_group(group(("a", 0.0), ("b", 0.0))) == [None, None]
    kinds = [type(part).__name__ for part in none.parts()]
    assert kinds == ["JoinedContext", "SiblingContext", "FeedbackContext"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FixedContext(" "), r"`text` of a FixedContext must not be empty: got ' '"),
        (lambda: JoinedContext({}), r"`contexts` must have at least one context: got none"),
        (lambda: SiblingContext(thinking=["<think>"]), r"`thinking` must be two tags.*'<think>'"),
        (lambda: JoinedContext({"A": "solution"}), r"`contexts\['A'\]` must be a Context: got 'so"),
        (lambda: OtherProblemContext(SiblingContext()), r"must be a RowContext: got <.*Sibling"),
        (lambda: SiblingContext(float("nan")), r"`threshold` must be in .*: got nan"),
    ],
)
def test_contexts_that_cannot_work_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        made: Context = make()
        del made
