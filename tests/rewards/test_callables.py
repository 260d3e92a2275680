"""Callables as reward functions, in this process and in others: the right value, or one line."""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any

import pytest

from helpers.rewards import judged_elsewhere
from helpers.rewards.judged_elsewhere import Judge, scaled
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards import ExactMatch, RewardFailures, RewardFunction, RewardRunner, Sample
from kdrl_lightning.rewards.base import judge
from kdrl_lightning.rewards.callables import portable_target

SAMPLE = Sample("abc", [], {"answer": "abc"})
FUNCTIONS: dict[str, tuple[Any, float]] = {
    "a partial": (partial(scaled, 2.0), 6.0),
    "a partial of a partial": (partial(partial(scaled, 2.0), shift=1.0), 7.0),
    "a bound method": (Judge(0.5).method, -0.5),
    "an object": (Judge(0.5), 0.5),
    "a method of the class": (Judge.of_class, 0.25),
    "a static method": (Judge.static, 0.125),
    "a reward": (ExactMatch(), 1.0),
    "a function": (judged_elsewhere.keyword_only.__globals__["reward"], 3.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seconds", [None, 30.0])
def test_it_judges_here_and_in_another_process(name: str, seconds: float | None) -> None:
    function, expected = FUNCTIONS[name]
    reward = RewardFunction(function, time_limit_s=seconds, workers=1)
    (verdict,) = RewardRunner(reward)([SAMPLE])
    assert verdict.reward == expected
    reward.close()


def test_numbers_of_other_libraries_come_back(tmp_path: Any) -> None:
    reward = RewardFunction(judged_elsewhere.number_of, time_limit_s=60.0, workers=1)
    runner = RewardRunner(reward, RewardFailures(1.0))
    samples = [Sample(text, [], {}) for text in ("numpy", "torch", "bool", "none")]
    with pytest.warns(UserWarning, match=r"1 of 4 .* reward must be a number: got None"):
        assert [v.reward for v in runner(samples)] == [0.5, 0.5, 1.0, 0.0]
    reward.close()


REFUSED: dict[str, tuple[Any, str]] = {
    "a class": (
        Judge,
        r"must be a function or an object: got the class Judge\. Create .* Judge\(\)",
    ),
    "a text": ("reward", r"must be a function of one sample: got 'reward'\. Give a function"),
    "nothing": (None, r"must be a function of one sample: got None"),
    "asynchronous": (judged_elsewhere.later, r"must not be asynchronous: got .*later"),
    "asynchronous, bound": (partial(judged_elsewhere.later), r"must not be asynchronous"),
    "a generator": (
        judged_elsewhere.one_by_one,
        r"must return its result: got the generator one_by_one",
    ),
    "two arguments": (judged_elsewhere.two, r"must take one argument, .*: got two\(prompt: 'str'"),
    "a keyword alone": (judged_elsewhere.keyword_only, r"must take one argument, the sample"),
    "none left": (partial(scaled, 1.0, SAMPLE), r"must take one argument, the sample: got partial"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_called_with_a_sample_is_one_line(name: str) -> None:
    function, words = REFUSED[name]
    for seconds in (None, 10.0):
        with pytest.raises(ConfigurationError, match=f"^`function` {words}") as caught:
            RewardFunction(function, time_limit_s=seconds)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=f"^`reward` {words}"):
        RewardRunner(function)


class Locked(Judge):
    """Holds what does not travel."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.lock = threading.Lock()


def test_what_does_not_travel_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    words = r"^`function` must be importable from another process: got .*{}.* Put it at the top"
    with pytest.raises(ConfigurationError, match=words.format("Locked object.*cannot pickle")):
        RewardFunction(Locked())
    assert RewardFunction(Locked(), time_limit_s=None)(SAMPLE) == 1.0
    with pytest.raises(ConfigurationError, match=words.format("lambda")):
        RewardFunction(lambda s: 1.0)
    with pytest.raises(ConfigurationError, match=words.format("partial object")):
        RewardFunction(partial(lambda s, t: 1.0, 1))
    monkeypatch.setattr(Judge, "__module__", "__main__")
    monkeypatch.setattr("__main__.Judge", Judge, raising=False)
    with pytest.raises(ConfigurationError, match=words.format("needs your main module")):
        RewardFunction(Judge(1.0).method)


def test_a_function_is_found_by_its_name_if_it_has_one() -> None:
    assert portable_target(scaled) == ("helpers.rewards.judged_elsewhere", "scaled")
    assert portable_target(Judge.static) == ("helpers.rewards.judged_elsewhere", "Judge.static")
    assert portable_target(len) == ("builtins", "len")
    assert portable_target(Judge(1.0).method)[0] is None


@pytest.mark.parametrize("results", ["ab", {"a": 1.0, "b": 2.0}, None, 1.0])
def test_the_results_of_a_batch_are_a_list(results: Any) -> None:
    reward = RewardFunction(lambda samples: results, batch=True, time_limit_s=None)
    with pytest.raises(TypeError, match=r"^`function` must return a list for a batch: got "):
        reward.judge([SAMPLE] * 2)


def ends_the_process(sample: Sample) -> float:
    sys.exit(3)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: RewardFunction(f, time_limit_s=None)])
def test_a_function_that_ends_the_process_only_fails(wrap: Any) -> None:
    (error,) = judge(wrap(ends_the_process), [Sample("", [], {})])
    assert str(error) == "it called sys.exit(3)"
