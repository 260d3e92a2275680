"""Exact match, and the runner that keeps a bad reward from corrupting a run."""

from __future__ import annotations

import math
import os
import threading
import warnings
from contextlib import nullcontext
from decimal import Decimal

import numpy as np
import pytest
import torch

from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.rewards import (
    ExactMatch,
    RewardFailures,
    RewardRunner,
    Sample,
    Verdict,
    WeightedRewards,
)

# Each test of a failing reward would have to expect that it is shown; one does.
pytestmark = pytest.mark.filterwarnings("ignore:the reward failed on .* of a rollout:UserWarning")

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


GSM8K = {
    "question": "She sold 48 clips in April and half as many in May. How many in all?",
    "answer": "She sold 48/2 = <<48/2=24>>24 in May.\n48+24 = <<48+24=72>>72 in all.\n#### 72",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48 + 24 = 72.\n#### 72", 1.0),
        ("####72\n", 1.0),
        ("#### 24", 0.0),
        ("#### 72 #### 24", 0.0),
        ("72", 0.0),
        ("", 0.0),
        # The working is no part of the reference.
        (f"#### {GSM8K['answer'].partition('####')[0]}", 0.0),
    ],
)
def test_the_reference_answer_is_cut_at_the_marker_too(text, expected):
    assert ExactMatch(marker="####")(sample(text, GSM8K)) == expected


def test_the_reference_answer_is_cut_at_its_last_marker():
    row = {"answer": "#### 41 #### 42"}
    assert ExactMatch(marker="####")(sample("#### 42", row)) == 1.0
    assert ExactMatch(marker="####")(sample("#### 41", row)) == 0.0


def test_without_a_marker_the_reference_answer_is_taken_whole():
    assert ExactMatch()(sample("72", GSM8K)) == 0.0
    assert ExactMatch()(sample(GSM8K["answer"], GSM8K)) == 1.0


@pytest.mark.parametrize("marker", [None, "#"])
@pytest.mark.parametrize("text", ["", "42", "#42"])
def test_a_row_without_the_answer_is_an_error(marker, text):
    with pytest.raises(KeyError, match="target"):
        ExactMatch(marker, answer_column="target")(sample(text))


@pytest.mark.parametrize("marker", [None, "#"])
def test_a_row_without_the_answer_is_found_before_training(marker):
    with pytest.raises(ConfigurationError, match=r"^`reward` must .+: got KeyError: 'target' for"):
        RewardRunner(ExactMatch(marker, answer_column="target")).try_once(ROW)


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
    runner = RewardRunner(lambda s: bad, RewardFailures(1.0))
    assert runner([sample()]) == [Verdict(0.0, False)]
    assert runner.failures == 1


def test_a_failing_reward_is_counted_and_given_0():
    def picky(s: Sample) -> float:
        return 1.0 if s.text == "fine" else fails(s)

    runner = RewardRunner(picky, RewardFailures(0.5))
    assert [v.reward for v in runner([sample("fine"), sample("bad")])] == [1.0, 0.0]
    runner([sample("bad"), sample("fine"), sample("fine")])
    assert runner.failures == 2


def fails_if_bad(s: Sample) -> float:
    return fails(s) if s.text == "bad" else 1.0


def rollout(bad: int, total: int) -> list[Sample]:
    return [sample("bad")] * bad + [sample("fine")] * (total - bad)


# The most failures that are borne: the fraction of all, and one in any case.
@pytest.mark.parametrize(
    ("fraction", "total", "most"),
    [(0.1, 2, 1), (0.1, 10, 1), (0.1, 20, 2), (0.1, 29, 2), (0.0, 10, 1), (0.5, 8, 4)],
)
def test_failures_up_to_the_bound_are_borne_and_more_stop_the_run(fraction, total, most):
    runner = RewardRunner(fails_if_bad, RewardFailures(fraction))
    verdicts = runner(rollout(most, total))
    assert [v.reward for v in verdicts] == [0.0] * most + [1.0] * (total - most)
    with pytest.raises(TrainingStopped, match=rf"on {most + 1} of {total} completions"):
        runner(rollout(most + 1, total))
    assert runner.failures == 2 * most + 1


def test_one_failure_of_one_completion_is_borne():
    assert RewardRunner(fails, RewardFailures(0.0))([sample()]) == [Verdict(0.0, False)]


def test_a_bound_of_1_never_stops():
    assert RewardRunner(fails, RewardFailures(1.0))(rollout(10, 10)) == [Verdict(0.0, False)] * 10


def test_failures_are_bounded_within_a_rollout_not_over_the_run():
    runner = RewardRunner(fails_if_bad)
    for _ in range(5):
        runner(rollout(1, 10))
    assert runner.failures == 5


@pytest.mark.parametrize("fraction", [-0.01, 1.01, math.nan, math.inf])
def test_a_bound_outside_0_and_1_is_refused(fraction):
    words = rf"^`reward_failures.max_frac` must be in \[0, 1\]: got {fraction}\.$"
    with pytest.raises(ConfigurationError, match=words):
        RewardFailures(max_frac=fraction)


def test_the_first_failure_of_each_kind_in_training_is_shown():
    def fails_by_name(s: Sample) -> float:
        raise {"a": KeyError, "b": OSError}[s.text]("why")

    runner = RewardRunner(fails_by_name, RewardFailures(1.0, -1.0))
    words = (
        r"^the reward failed on 1 of 1 completions of a rollout, which count as wrong and get -1: "
    )
    for text, error in (("a", "KeyError: 'why'"), ("b", "OSError: why")):
        with pytest.warns(UserWarning, match=words + rf"the last error was {error}\.$"):
            runner([sample(text)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runner([sample(text)])


def test_a_failed_completion_gets_what_is_documented():
    verdicts = RewardRunner(fails_if_bad, RewardFailures(reward=-2.0))(rollout(1, 10))
    assert verdicts == [Verdict(-2.0, False)] + [Verdict(1.0, True)] * 9


def test_a_failed_reward_that_is_no_number_is_refused():
    with pytest.raises(
        ConfigurationError, match=r"^`reward_failures.reward` must be .*: got nan\.$"
    ):
        RewardFailures(reward=math.nan)


@pytest.mark.parametrize("bad", [1, 3, 10])
def test_an_evaluation_warns_of_failures_and_goes_on(bad):
    runner = RewardRunner(fails_if_bad, RewardFailures(0.0))
    words = (
        rf"^the reward failed on {bad} of 10 completions of an evaluation, "
        r"which count as wrong: the last error was KeyError: 'answer'\.$"
    )
    with pytest.warns(UserWarning, match=words) as caught:
        verdicts = runner(rollout(bad, 10), training=False)
    assert len(caught) == 1
    assert verdicts == [Verdict(0.0, False)] * bad + [Verdict(1.0, True)] * (10 - bad)
    assert runner.failures == bad


def test_an_evaluation_without_failures_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RewardRunner(fails_if_bad)(rollout(0, 10), training=False)
        RewardRunner(fails_if_bad)([], training=False)


def test_failures_above_the_bound_stop_the_run_with_the_figures():
    runner = RewardRunner(fails_if_bad)
    words = (
        r"^the reward failed on 2 of 10 completions, above 10%: "
        r"the last error was KeyError: 'answer'\. "
        r"Fix the reward function\.$"
    )
    with pytest.raises(TrainingStopped, match=words):
        runner(rollout(2, 10))
    assert runner.failures == 2


def test_an_error_without_words_is_named():
    def silent(_: Sample) -> float:
        raise ZeroDivisionError

    with pytest.raises(TrainingStopped, match=r"the last error was ZeroDivisionError\. Fix"):
        RewardRunner(silent)([sample()] * 2)


def test_a_reward_that_is_not_finite_is_named():
    with pytest.raises(TrainingStopped, match=r"the last error was ValueError: reward nan\."):
        RewardRunner(lambda s: math.nan)([sample()] * 2)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (np.float32(0.5), Verdict(0.5, False)),
        (np.bool_(True), Verdict(1.0, True)),
        (np.array([1.0]), Verdict(1.0, True)),
        (np.int64(2), Verdict(2.0, True)),
        (torch.tensor([0.25], requires_grad=True), Verdict(0.25, False)),
        (torch.tensor(True), Verdict(1.0, True)),
        (Decimal("0.5"), Verdict(0.5, False)),
        (Verdict(np.float64(0.5), np.bool_(True), {"a": torch.tensor(2)}), Verdict(0.5, True)),
        (Verdict(1, 0), Verdict(1.0, False)),
    ],
)
def test_numbers_of_other_libraries_are_read(result, expected):
    (verdict,) = RewardRunner(lambda s: result)([sample()])
    assert (verdict.reward, verdict.correct) == (expected.reward, expected.correct)
    assert type(verdict.reward) is float and type(verdict.correct) is bool


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("1.0", r"TypeError: reward must be a number: got '1\.0' \(str\)"),
        (None, r"TypeError: reward must be a number: got None \(NoneType\)"),
        ({"reward": 1.0}, r"TypeError: reward must be a number: got \{.* \(dict\)"),
        ((1.0, True), r"TypeError: reward must be a number: got \(1\.0, True\) \(tuple\)"),
        (1j, r"TypeError: reward must be a number: got 1j \(complex\)"),
        (np.float64("nan"), r"ValueError: reward nan"),
        (1e39, r"ValueError: reward 1e\+39"),  # infinite in float32
        (np.array([1.0, 2.0]), r"ValueError: can only convert an array of size 1"),
        (Verdict("1.0", True), r"TypeError: reward must be a number"),
        (Verdict(1.0, "False"), r"TypeError: correct must be a number: got 'False' \(str\)"),
        (Verdict(1.0, None), r"TypeError: correct must be a number"),
        (Verdict(1.0, math.nan), r"ValueError: correct nan"),
    ],
)
def test_results_that_are_no_numbers_are_one_line(result, words):
    with pytest.raises(ConfigurationError, match=words) as caught:
        RewardRunner(lambda s: result).try_once(ROW)
    assert "\n" not in str(caught.value)


def test_a_reward_changes_its_row_and_tokens_for_itself_alone():
    row, ids = {"answer": "42", "metadata": {"n": [1]}}, [5, 6]

    def spoils(s: Sample) -> float:
        s.row["metadata"]["n"].append(len(s.ids))
        s.ids.clear()
        return float(s.row.pop("answer") == "42")

    runner = RewardRunner(
        WeightedRewards({"spoils": spoils, "again": spoils, "right": ExactMatch()})
    )
    verdicts = runner([Sample("42", ids, row)] * 2)
    assert [v.reward for v in verdicts] == [3.0, 3.0]
    assert row == {"answer": "42", "metadata": {"n": [1]}} and ids == [5, 6]
    runner.try_once({**row})
    assert row["metadata"] == {"n": [1]}


def test_a_row_that_cannot_be_copied_is_copied_at_its_top():
    row = {"answer": "42", "lock": threading.Lock()}

    def spoils(s: Sample) -> float:
        return float(s.row.pop("answer") == "42")  # type: ignore[attr-defined]

    assert RewardRunner(spoils)([sample("42", row)]) == [Verdict(1.0, True)]
    assert row["answer"] == "42"


def test_what_can_be_copied_in_such_a_row_is_copied():
    row = {"answer": "42", "lock": threading.Lock(), "metadata": {"n": [1]}}

    def spoils(s: Sample) -> float:
        s.row["metadata"]["n"].append(2)
        return 1.0

    assert RewardRunner(spoils)([sample("42", row)]) == [Verdict(1.0, True)]
    assert row["metadata"] == {"n": [1]}


@pytest.mark.parametrize("fails_there", [False, True])
def test_a_reward_that_leaves_the_working_folder_does_not_move_the_run(tmp_path, fails_there):
    before = os.getcwd()

    def leaves(s: Sample) -> float:
        folder = tmp_path / "gone"
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        folder.rmdir()
        if fails_there:
            raise ValueError("no")
        return 1.0

    with nullcontext() if not fails_there else pytest.warns(UserWarning, match="the reward failed"):
        RewardRunner(leaves, RewardFailures(max_frac=1.0))([sample("42", {})])
    assert os.getcwd() == before


def test_no_samples_no_verdicts():
    assert RewardRunner(fails)([]) == []


def test_an_interrupt_is_no_failure():
    def interrupted(_: Sample) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardRunner(interrupted)([sample()])


def test_try_once_calls_with_the_row_without_and_with_a_text():
    seen: list[Sample] = []

    def reward(s: Sample) -> float:
        seen.append(s)
        return 0.0

    runner = RewardRunner(reward)
    runner.try_once(ROW)
    assert seen == [Sample("", [], ROW), Sample("6*7=", [0, 0, 0, 0], ROW)]
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
    words = rf"^`reward` must return a finite number: got {found} for the completion '' of the "
    with pytest.raises(ConfigurationError, match=words) as caught:
        RewardRunner(reward).try_once(ROW)
    assert str(caught.value).endswith(f"row {ROW!r}. Fix the reward function.")
    assert caught.value.__cause__ is not None


def test_try_once_shortens_a_long_row():
    with pytest.raises(ConfigurationError, match=r"x\.\.\.\. Fix") as caught:
        RewardRunner(fails).try_once({"prompt": "x" * 5000})
    assert len(str(caught.value)) < 400
