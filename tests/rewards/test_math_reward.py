"""MathReward: which answer counts, which answers are equal, and malicious completions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards import MathReward, Sample
from kdrl_lightning.rewards.answers.extraction import after_marker, last_boxed, last_tagged
from kdrl_lightning.rewards.math import equal_at_once


def judged(reward: MathReward, text: str, gold: Any) -> Any:
    (result,) = reward.judge([Sample(text, [], {"answer": gold})])
    return result


CASES = [
    (r"\boxed{42}", "42", 1),
    (r"\boxed{42}", 42, 1),
    (r"\boxed{042.}", "42", 1),
    ("42", "42", 0),
    ("I think 41 or 42", "42", 0),
    (r"\boxed{41} or \boxed{42}", "42", 1),
    (r"\boxed{42} or \boxed{41}", "42", 0),
    (r"\boxed{41 or 42}", "42", 0),
    (r"\boxed{41, 42}", "42", 0),
    (r"\boxed{42", "42", 0),
    (r"\boxed{42} \boxed{", "42", 0),
    (r"\boxed{}", "42", 0),
    (r"\boxed{\boxed{42}}", "42", 1),
    (r"\boxed{\frac{1}{2}}", "0.5", 1),
    (r"\boxed{0.5}", r"so it is \boxed{\dfrac12}.", 1),
    (r"\boxed{0.33}", r"\frac13", 0),
    (r"\boxed{1,000}", "1000", 1),
    (r"\boxed{x=5}", "5", 1),
    (r"\boxed{1+x}", "x+1", 1),
    (r"\boxed{(2, 1)}", "(1, 2)", 0),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1),
    (r"\boxed{\sqrt{8}}", r"$2\sqrt{2}$", 1),
    (r"\boxed{5\text{ cm}}", "5", 1),
    (r"\boxed{\text{Yes}}", "yes", 1),
    (r"\boxed{eys}", "yes", 0),
    (r"\boxed{\text{(B)}}", "B", 1),
    (r"\boxed{b}", "B", 0),
    (r"\boxed{½}", "0.5", 1),
    (r"\boxed{1½}", "1.5", 1),
    (r"\boxed{１２}", "12", 1),
    (r"\boxed{–5}", "-5", 1),
    (r"\boxed{12\ }", "12", 1),
    (r"\boxed{12\quad}", "12", 1),
    (r"\boxed{\[12\]}", "12", 1),
    (r"\boxed{**12**}", "12", 1),
    (r"\boxed{`12`}", "12", 1),
    (r"\boxed{\boldsymbol{12}}", "12", 1),
    (r"\boxed{\varnothing}", r"\emptyset", 1),
    (r"\boxed{x<3}", r"(-\infty,3)", 1),
    (r"\boxed{3 \le x \le 5}", "[3,5]", 1),
    (r"\boxed{3 \le x \le 6}", "[3,5]", 0),
    (r"\boxed{x \le 3}", r"(-\infty,3)", 0),
    (r"\boxed{\text{(C) } 5}", "C", 1),
    (r"\boxed{C. 5}", "C", 1),
    (r"\boxed{\text{(B) } 5}", "C", 0),
    (r"\boxed{\text{(C) 5 or (B) 6}}", "C", 0),
    (r"\boxed{5 (C)}", "C", 0),
]


@pytest.mark.parametrize(("text", "gold", "expected"), CASES)
def test_answers(math_reward: MathReward, text: str, gold: Any, expected: float) -> None:
    assert judged(math_reward, text, gold) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 24\n#### 72", 1),
        ("#### 72\n#### 24", 0),
        (r"#### $\frac{144}{2}$" + "\nDone: 3.", 1),
        ("####\n72", 1),
        ("72", 0),
        (r"\boxed{72}", 0),
        ("#### 71 or 72", 0),
    ],
)
def test_the_answer_after_a_marker(math_reward: MathReward, text: str, expected: float) -> None:
    marked = MathReward(marker="####")
    marked.pool = math_reward.pool
    assert judged(marked, text, "24 + 48 = <<24+48=72>>72\n#### 72") == expected


HOSTILE = {
    "nested braces": r"\boxed{" + "{" * 100 + "}" * 100 + "}",
    "nested roots": r"\boxed{" + r"\sqrt{" * 80 + "2" + "}" * 80 + "}",
    "a megabyte": "x" * 1_000_000,
    "a megabyte in a box": r"\boxed{" + "1+" * 500_000 + "1}",
    "many boxes": r"\boxed{" * 100_000,
    "many escapes": r"\boxed{" + "\\" * 200_000,
    "null": "\\boxed{\0}",
    "surrogates": "\\boxed{\ud800}",
    "right to left": "\\boxed{\u202e24}",
    "empty": "",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_text_made_to_do_harm_is_wrong(math_reward: MathReward, case: str) -> None:
    assert judged(math_reward, HOSTILE[case], "1/2") == 0.0


def test_a_power_that_never_ends_is_stopped_and_the_others_are_judged() -> None:
    reward = MathReward(time_limit_s=1.0, workers=1)
    reward.start()
    texts = (r"\boxed{9^{9^{9^{9}}}}", r"\boxed{0.5}", r"\boxed{9^{9^{9^{9}}}}")
    hung, right, again = reward.judge([Sample(text, [], {"answer": "1/2"}) for text in texts])
    assert isinstance(hung, TimeoutError) and hung is again  # one and the same comparison
    assert right == 1.0
    reward.close()


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"answer": "  "}, "`answer` is empty"),
        ({}, "'answer'"),
        ({"answer": "\\"}, "math-verify cannot read the reference"),
    ],
)
def test_a_row_without_a_reference_is_an_error(
    math_reward: MathReward, row: dict[str, str], error: str
) -> None:
    (result,) = math_reward.judge([Sample(r"\boxed{1/2}", [], row)])
    assert isinstance(result, Exception) and error in str(result)


def test_where_math_verify_does_not_work_setup_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = MathReward()
    monkeypatch.setattr(reward.pool, "map", lambda pairs: [False])
    with pytest.raises(ConfigurationError, match=r"`math_verify` must find .*: got False"):
        reward.start()


@given(st.integers(-(10**15), 10**15), st.integers(-(10**15), 10**15))
def test_integers_are_compared_as_numbers(one: int, other: int) -> None:
    assert equal_at_once(str(one), str(other)) == (one == other)
    assert equal_at_once(str(one), f"{one:+018d}") is True


@given(st.text(alphabet="{}\\boxed1 ", max_size=40))
def test_what_is_in_the_box_is_balanced(text: str) -> None:
    inside = last_boxed(text)
    if inside is None:
        return
    assert "\\boxed{" in text and inside in text
    depth = 0
    plain = inside.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
    for char in plain:
        depth += {"{": 1, "}": -1}.get(char, 0)
        assert depth >= 0
    assert depth == 0


@given(st.text(max_size=20), st.text(max_size=20).filter(lambda text: "<" not in text))
def test_what_was_put_in_is_found(before: str, answer: str) -> None:
    assert last_tagged(f"{before}<answer>{answer}</answer>", "answer") == answer.strip()
    assert last_tagged(answer, "answer") is None
    assert after_marker(f"{before}<{answer}", "<") == answer.strip()
    assert after_marker(answer, "<") is None
