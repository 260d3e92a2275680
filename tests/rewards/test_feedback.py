"""A reward's feedback on a completion reaches the verdict, for a teacher that reads it."""

from __future__ import annotations

from typing import Any

import pytest

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards import (
    AnswerFeedback,
    ExactMatch,
    MathReward,
    RewardRunner,
    Sample,
    Verdict,
    WeightedRewards,
)
from kdrl_lightning.rewards.base import judge
from kdrl_lightning.tiny import AdditionFeedback, ColumnAddition

ROW = {"prompt": "1+1="}


def says(text: Any) -> Any:
    return lambda sample: Verdict(0.0, False, {"part": 1.0}, text)


def test_feedback_is_kept() -> None:
    (verdict,) = RewardRunner(says("too small"))([Sample("1", [1], ROW)])
    assert verdict == Verdict(0.0, False, {"part": 1.0}, "too small")
    assert Verdict.of(1.0).feedback == ""


@pytest.mark.parametrize("text", [None, 5, ["a"]])
def test_feedback_that_is_no_text_is_an_error_of_the_reward(text: Any) -> None:
    (result,) = judge(says(text), [Sample("1", [1], ROW)])
    assert isinstance(result, TypeError) and "feedback must be a string: got" in str(result)


def test_rewards_in_a_sum_all_have_their_say() -> None:
    rewards = {"a": says("too small"), "b": lambda s: 1.0, "c": says("and too late")}
    verdict = WeightedRewards(rewards)(Sample("1", [1], ROW))
    assert isinstance(verdict, Verdict) and verdict.feedback == "too small\nand too late"


def test_a_reward_without_feedback_is_refused_where_it_is_asked() -> None:
    for reward in (says(""), says(" \n"), lambda s: 1.0):
        with pytest.raises(ConfigurationError, match=r"`reward` must return feedback for a Feedba"):
            RewardRunner(reward).require_feedback([ROW])
    RewardRunner(says("no")).require_feedback([ROW])
    RewardRunner(lambda s: Verdict(0.0, False, {}, "none" if not s.text else "")).require_feedback(
        [ROW]
    )


@pytest.mark.parametrize(
    ("shows", "wrong", "missing"),
    [
        ("form", "", "The answer is missing: no answer was found."),
        ("verdict", "The answer 41 is wrong.", "The answer is missing: no answer was found."),
        (
            "reference",
            "The answer 41 is wrong. The right answer is 42.",
            "The answer is missing: no answer was found. The right answer is 42.",
        ),
    ],
)
def test_a_line_says_no_more_than_it_may(shows: Any, wrong: str, missing: str) -> None:
    row = {"prompt": "6*7=", "answer": "42"}
    texts = {"#41": wrong, "none": missing, "#42": ""}
    reward = AnswerFeedback(ExactMatch(marker="#"), shows)
    for text, said in texts.items():
        verdict = reward(Sample(text, [1], row))
        assert isinstance(verdict, Verdict) and verdict.feedback == said
        assert verdict.correct == (text == "#42") and verdict.reward == float(verdict.correct)
        assert shows == "reference" or "42" not in verdict.feedback
    RewardRunner(reward).require_feedback([row])


def test_a_line_on_a_boxed_answer_and_on_one_that_was_cut_off() -> None:
    row = {"prompt": "6*7=", "answer": "42"}
    reward = AnswerFeedback(MathReward())
    (wrong, cut) = judge(
        reward, [Sample("\\boxed{4\n 1}", [1], row), Sample("6*", [1], row, truncated=True)]
    )
    assert isinstance(wrong, Verdict) and wrong.feedback == "The answer 4 1 is wrong."
    assert isinstance(cut, Verdict) and cut.feedback.endswith("missing: the text was cut off.")
    assert reward.answer(Sample("\\boxed{41}", [1], row)) == "41"


def test_what_the_reward_itself_says_is_kept_and_a_long_answer_is_cut() -> None:
    verdict = AnswerFeedback(says("test 2 failed"))(Sample("x", [1], ROW))
    assert isinstance(verdict, Verdict) and verdict.feedback == "test 2 failed"
    long = AnswerFeedback(lambda sample: 0.0)(Sample("y" * 500, [1], ROW))
    assert isinstance(long, Verdict) and len(long.feedback) < 230


def test_feedback_with_unknown_settings_or_without_a_reference_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`shows` must be one of form, verdict, referenc"):
        AnswerFeedback(ExactMatch(), "all")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="`answer_column` must be a column of each row"):
        AnswerFeedback(lambda sample: 0.0, "reference", "gold").check({"prompt": "1", "answer": 2})
    with pytest.raises(ConfigurationError, match="must have an answer"):
        AnswerFeedback(ExactMatch()).check({"prompt": "1", "answer": ""})
    with pytest.raises(ConfigurationError, match="`shows` must be one of column, solution: got al"):
        AdditionFeedback("all")  # type: ignore[arg-type]


def test_feedback_on_an_addition() -> None:
    for row in (ColumnAddition(8, solutions=True)[i] for i in range(8)):
        right = row["solution"]
        *columns, last = right.split(",")
        texts = {
            ",".join(["99", *columns[1:], last]) + "1": 1,
            ",".join([*columns[:2], "99", last]) + "1": 3,
            right + "1": 5,  # the columns are right, the result is not
            "": 1,
            columns[0]: 2,
        }
        for text, number in texts.items():
            sample = Sample(text, [1], row)
            assert AdditionFeedback("column")(sample) == Verdict(0.0, False, {}, str(number))
            assert AdditionFeedback("solution")(sample).feedback == right
        assert AdditionFeedback()(Sample(right, [1], row)) == Verdict(1.0, True)
