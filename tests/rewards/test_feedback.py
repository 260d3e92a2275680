"""What a reward says of a completion reaches the verdict, for a teacher that reads it."""

from __future__ import annotations

from typing import Any

import pytest

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards import RewardRunner, Sample, Verdict, WeightedRewards
from kdrl_lightning.rewards.base import judge

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
    assert isinstance(result, TypeError) and "feedback must be a text: got" in str(result)


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
