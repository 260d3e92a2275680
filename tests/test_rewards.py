"""Exact match, and the runner that keeps a bad reward from corrupting a run."""

from __future__ import annotations

import math

import pytest
import torch

from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.rewards import ExactMatch, RewardRunner, Sample, Verdict

ROW = {"prompt": "6*7=", "answer": "42"}


def sample(text: str = "", row: dict | None = None) -> Sample:
    return Sample(text, [], row or ROW)


def fails(_: Sample) -> float:
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("42", 1.0), (" 42\n", 1.0), ("4 2", 0.0), ("042", 0.0), ("42.0", 0.0), ("", 0.0)],
)
def test_exact_match_compares_the_whole_completion(text, expected):
    assert ExactMatch()(sample(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6*7=42 #42", 1.0), ("#41 #42", 1.0), ("#42 #41", 0.0), ("42", 0.0), ("42#", 0.0)],
)
def test_exact_match_takes_what_follows_the_last_marker(text, expected):
    assert ExactMatch(marker="#")(sample(text)) == expected


def test_a_marker_may_be_several_characters():
    assert ExactMatch(marker="####")(sample("so #42 #### 42 ")) == 1.0


@pytest.mark.parametrize("answer", [42, "42", " 42 "])
def test_exact_match_reads_the_answer_as_text(answer):
    assert ExactMatch()(sample("42", {"answer": answer})) == 1.0


def test_exact_match_reads_the_named_column():
    assert ExactMatch(answer_column="target")(sample("7", {"answer": "42", "target": "7"})) == 1.0


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (1.0, Verdict(1.0, True)),
        (1, Verdict(1.0, True)),
        (True, Verdict(1.0, True)),
        (False, Verdict(0.0, False)),
        (0.99, Verdict(0.99, False)),
        (-1.0, Verdict(-1.0, False)),
        (2.5, Verdict(2.5, True)),
        (Verdict(0.2, True), Verdict(0.2, True)),
        (Verdict(1.0, False), Verdict(1.0, False)),
        (torch.tensor(1.0), Verdict(1.0, True)),
    ],
)
def test_a_number_is_its_own_verdict_and_a_verdict_stays(result, expected):
    (verdict,) = RewardRunner(lambda s: result)([sample()])
    assert verdict == expected
    assert type(verdict.reward) is float and type(verdict.correct) is bool


def test_verdicts_are_in_the_order_of_the_samples():
    runner = RewardRunner(ExactMatch())
    verdicts = runner([sample(text) for text in ("41", "42", "43", "42")])
    assert [v.correct for v in verdicts] == [False, True, False, True]
    assert runner.failures == 0


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, None, "one", Verdict(math.nan, True)]
)
def test_a_result_that_is_no_finite_number_is_a_failure(bad):
    runner = RewardRunner(lambda s: bad, max_failure_frac=1.0)
    assert runner([sample()]) == [Verdict(0.0, False)]
    assert runner.failures == 1


def test_a_failing_reward_is_counted_and_given_0():
    def picky(s: Sample) -> float:
        return 1.0 if s.text == "fine" else fails(s)

    runner = RewardRunner(picky, max_failure_frac=0.5)
    assert [v.reward for v in runner([sample("fine"), sample("bad")])] == [1.0, 0.0]
    runner([sample("bad"), sample("fine"), sample("fine")])
    assert runner.failures == 2


def test_failures_up_to_the_bound_are_borne():
    texts = ["bad"] + ["fine"] * 9
    runner = RewardRunner(lambda s: fails(s) if s.text == "bad" else 1.0)
    assert len(runner([sample(t) for t in texts])) == 10


def test_failures_above_the_bound_stop_the_run():
    texts = ["bad"] * 2 + ["fine"] * 8
    runner = RewardRunner(lambda s: fails(s) if s.text == "bad" else 1.0)
    words = (
        r"^the reward failed on 2 of 10 completions, above 10%: last KeyError: 'answer'\. "
        r"Mend the reward function\.$"
    )
    with pytest.raises(TrainingStopped, match=words):
        runner([sample(t) for t in texts])
    assert runner.failures == 2


def test_an_error_without_words_is_named():
    def silent(_: Sample) -> float:
        raise ZeroDivisionError

    with pytest.raises(TrainingStopped, match=r"last ZeroDivisionError\. Mend"):
        RewardRunner(silent)([sample()])


def test_a_reward_that_is_not_finite_is_named():
    with pytest.raises(TrainingStopped, match=r"last ValueError: reward nan\."):
        RewardRunner(lambda s: math.nan)([sample()])


def test_no_samples_no_verdicts():
    assert RewardRunner(fails)([]) == []


def test_an_interrupt_is_no_failure():
    def interrupted(_: Sample) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardRunner(interrupted)([sample()])


def test_try_once_calls_with_the_row_and_an_empty_completion():
    seen: list[Sample] = []

    def reward(s: Sample) -> float:
        seen.append(s)
        return 0.0

    runner = RewardRunner(reward)
    runner.try_once(ROW)
    assert seen == [Sample("", [], ROW)]
    assert runner.failures == 0


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        (fails, r"KeyError: 'answer'"),
        (lambda s: math.nan, r"ValueError: reward nan"),
        (lambda s: None, r"TypeError: .+"),
    ],
)
def test_try_once_refuses_a_reward_that_fails(reward, found):
    words = rf"^`reward` must return a finite number: got {found} for an empty completion of the "
    with pytest.raises(ConfigurationError, match=words) as caught:
        RewardRunner(reward).try_once(ROW)
    assert str(caught.value).endswith(f"row {ROW!r}. Mend the reward function.")
    assert caught.value.__cause__ is not None


def test_try_once_shortens_a_long_row():
    with pytest.raises(ConfigurationError, match=r"x\.\.\.\. Mend") as caught:
        RewardRunner(fails).try_once({"prompt": "x" * 5000})
    assert len(str(caught.value)) < 400
