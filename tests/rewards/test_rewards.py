"""Rewards that need no other process: formats, puzzles, generated tasks, compositions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_lightning.errors import ConfigurationError, load_library
from kdrl_lightning.prompts import KnightsAndKnavesPrompts, ReasoningGymPrompts
from kdrl_lightning.rewards import (
    BatchReward,
    FormatReward,
    KnightsAndKnavesReward,
    ReasoningGymReward,
    RewardRunner,
    RoutedReward,
    Sample,
    TaskReward,
    Verdict,
    WeightedRewards,
)
from kdrl_lightning.rewards.base import judge, walk
from kdrl_lightning.rewards.processes.workers import WorkerPool
from kdrl_lightning.rewards.reasoning_gym import CONSTANTS

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
RIGHT = "<think>so</think>\n<answer>42</answer>\n"


def sample(text: str = "", **row: Any) -> Sample:
    return Sample(text, [], row)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RIGHT, 1),
        ("<think></think><answer></answer>", 1),
        ("", 0),
        ("42", 0),
        (f"Well: {RIGHT}", 0),
        (f"{RIGHT} Done.", 0),
        ("<think>so</think> hence <answer>42</answer>", 0),
        ("<answer>42</answer><think>so</think>", 0),
        ("<think>so<answer>42</answer></think>", 0),
        ("<think>so</think><answer>41</answer><answer>42</answer>", 0),
        ("<think><think>so</think><answer>42</answer>", 0),
        ("so</think><answer>42</answer>", 0),
        ("<think>so</think><answer>42", 0),
        ("<THINK>so</THINK><answer>42</answer>", 0),
    ],
)
def test_the_tags_stand_once_in_their_order(text: str, expected: float) -> None:
    assert FormatReward()(sample(text)) == expected


def test_a_prompt_may_open_the_thinking() -> None:
    opened = FormatReward(opened=True)
    assert opened(sample("so</think><answer>42</answer>")) == 1.0
    assert opened(sample(RIGHT)) == 0.0


@given(st.lists(st.sampled_from([*TAGS, "x", " "]), max_size=9))
def test_only_one_order_of_tags_is_the_format(parts: list[str]) -> None:
    text = "".join(parts)
    tags = [part for part in parts if part in TAGS]
    outside = "".join(
        part for i, part in enumerate(parts) if sum(p in TAGS for p in parts[:i]) in (0, 2, 4)
    )
    for tag in TAGS:
        outside = outside.replace(tag, "")
    assert FormatReward()(sample(text)) == float(tags == list(TAGS) and not outside.strip())


SOLUTION = "Emma is a knight, and Liam is a knave."


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (SOLUTION, 2.0),
        ("(1) liam is a KNAVE\n(2) Emma is a knight", 2.0),
        ("Emma is a knight, Liam is a knight", -1.5),
        ("Emma is a knight, Liam is not a knave", -1.5),
        ("Emma is a knight", -2.0),
        ("Emma is a knight, Liam is a knave, Liam is a knight", -2.0),
        ("", -2.0),
    ],
)
def test_format_and_answer_are_rewarded_separately(answer: str, value: float) -> None:
    reward = KnightsAndKnavesReward()
    formed = reward(sample(f"<think>so</think><answer>{answer}</answer>", answer=SOLUTION))
    assert formed == Verdict(1.0 + value, value == 2.0, {"format": 1.0, "answer": value})
    # Logic-RL: without the format the answer does not count.
    bare = reward(sample(f"<answer>{answer}</answer>", answer=SOLUTION))
    assert bare == Verdict(-3.0, False, {"format": -1.0, "answer": -2.0})


def test_the_reward_reads_the_puzzles_of_the_library() -> None:
    source = KnightsAndKnavesPrompts(people=4, size=8)
    for row in (source[i] for i in range(len(source))):
        right = row["answer"]
        terms = row["metadata"]["knight_knave_terms"]
        wrong = right.replace(terms["knight"], "?").replace(terms["knave"], terms["knight"])
        for answer, correct in ((right, True), (wrong, False), (row["question"], False)):
            text = f"<think>so</think><answer>{answer}</answer>"
            assert KnightsAndKnavesReward()(Sample(text, [], row)).correct == correct


@pytest.mark.parametrize("answer", ["", "Who knows.", "Emma is a knight, Emma is a knave."])
def test_a_solution_that_cannot_be_read_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="`answer` must name the role of each inhabitant once"):
        KnightsAndKnavesReward()(sample("", answer=answer))


@pytest.fixture(scope="module")
def gym() -> Iterator[ReasoningGymReward]:
    reward = ReasoningGymReward(workers=1, time_limit_s=20.0)
    yield reward
    reward.close()


def another(gym: ReasoningGymReward, **arguments: Any) -> ReasoningGymReward:
    """One with other arguments and the same process."""
    reward = ReasoningGymReward(**arguments)
    reward.pool = gym.pool
    return reward


def test_a_task_is_scored_by_its_own_scorer_and_strictly_extracted(
    gym: ReasoningGymReward,
) -> None:
    row = ReasoningGymPrompts("chain_sum", size=1)[0]
    right, marked, partial = row["answer"], another(gym, marker="#"), another(gym, partial=True)
    for text, in_tags, behind_marker in (
        (f"<answer> {right} </answer>", 1.0, 0.0),
        (f"# {right}", 0.0, 1.0),
        (right, 0.0, 0.0),
        (f"<answer>{right}</answer><answer>0.5</answer>", 0.0, 0.0),
        (f"<answer>It is {right}.</answer>", 0.0, 0.0),
        ("<answer></answer>", 0.0, 0.0),
    ):
        assert gym(Sample(text, [], row)) == Verdict(in_tags, in_tags == 1.0)
        assert marked(Sample(text, [], row)) == Verdict(behind_marker, behind_marker == 1.0)
    some = Verdict.of(partial(Sample(f"<answer>It is {right}.</answer>", [], row)))
    assert 0.0 < some.reward < 1.0 and not some.correct


def test_an_answer_that_a_scorer_cannot_read_is_wrong(gym: ReasoningGymReward) -> None:
    row = ReasoningGymPrompts("prime_factorization", size=1)[0]
    reward = another(gym, task="prime_factorization")
    assert reward(Sample(f"<answer>{row['answer']}</answer>", [], row)) == Verdict(1.0, True)
    assert reward(Sample("<answer>x × 7</answer>", [], row)) == Verdict(0.0, False)
    # A row that is itself unreadable is a failure of the reward.
    with pytest.raises(ValueError, match="invalid literal"):
        reward(Sample("<answer>x × 7</answer>", [], {**row, "answer": "y × 7"}))


def test_an_answer_that_a_scorer_computes_for_ever_is_a_failure() -> None:
    row = ReasoningGymPrompts("simple_integration", size=1)[0]
    reward = ReasoningGymReward(workers=1, time_limit_s=2.0)
    texts = [f"<answer>{answer}</answer>" for answer in (row["answer"], "9**9**9**9")]
    right, hung = reward.judge([Sample(text, [], row) for text in texts])
    assert right == Verdict(1.0, True) and isinstance(hung, TimeoutError)
    reward.close()


def test_a_scorer_that_accepts_anything_or_is_not_there_is_refused(
    gym: ReasoningGymReward,
) -> None:
    row = ReasoningGymPrompts("game_of_life_halting", size=1)[0]
    words = "`task` must have a scorer that rejects wrong answers"
    with pytest.raises(ConfigurationError, match=words) as caught:
        RewardRunner(gym).try_once(row)
    found = r"game_of_life_halting, whose scorer in reasoning-gym gives '.+' full credit for most"
    assert re.search(found, str(caught.value))
    with pytest.raises(
        ConfigurationError, match="`task` must be a task of reasoning-gym: got nope"
    ):
        RewardRunner(another(gym, task="nope")).try_once(row)
    with pytest.raises(ConfigurationError, match="got KeyError: 'metadata'"):
        RewardRunner(gym).try_once({"prompt": "", "answer": ""})


@pytest.mark.parametrize(("task", "constant"), [("complex_arithmetic", "nan"), ("coin_flip", "0")])
def test_a_scorer_that_a_constant_satisfies_is_refused_by_name(
    gym: ReasoningGymReward, task: str, constant: str
) -> None:
    row = ReasoningGymPrompts(task, size=1, seed=3)[0]
    words = f"got {task}, whose scorer in reasoning-gym gives '{constant}' full credit for most"
    with pytest.raises(ConfigurationError, match=words):
        another(gym).check(row)
    with pytest.raises(ConfigurationError, match=words):  # nor where nothing was checked
        gym(Sample(f"<answer>{constant}</answer>", [], row))


def test_a_constant_that_is_right_by_chance_is_right(gym: ReasoningGymReward) -> None:
    items = ReasoningGymPrompts("chain_sum", size=1)[0]
    row = {**items, "answer": "1", "metadata": {"source_dataset": "chain_sum"}}
    another(gym).check(row)
    assert gym(Sample("<answer>1</answer>", [], row)) == Verdict(1.0, True)


def test_a_scorer_that_rejects_the_rows_own_answer_is_refused(gym: ReasoningGymReward) -> None:
    row = ReasoningGymPrompts("rearc", size=1)[0]
    another(gym).check(row)
    read = json.loads(json.dumps(row))  # its grids are lists now, which equal no tuples
    words = (
        r"^the scorer of rearc must give full credit to the answer of the row: got 0\.0\d* for '"
    )
    with pytest.raises(ConfigurationError, match=words):
        another(gym).check(read)
    another(gym).check({**read, "answer": None})  # nothing to compare with


def test_each_task_is_probed_once(gym: ReasoningGymReward, monkeypatch: Any) -> None:
    reward, asked = another(gym), list[Any]()
    monkeypatch.setattr(reward.pool, "map", lambda calls: asked.extend(calls) or [])
    rows = [ReasoningGymPrompts(task, size=2) for task in ("chain_sum", "basic_arithmetic")]
    RewardRunner(reward).check(source[i] for source in rows for i in (0, 1))
    assert len(asked) == 2 * len((*CONSTANTS, "the right one")) and {
        task for task, *_ in asked
    } == {
        "chain_sum",
        "basic_arithmetic",
    }


def test_what_is_not_installed_is_named_with_the_command() -> None:
    pool = WorkerPool(load_library, 1.0, 1, ["no_such_library"])
    words = r"^`no_such_library` must be installed: .*pip install 'kdrl_lightning\[tasks\]'`\.$"
    with pytest.raises(ConfigurationError, match=words):
        pool.map(["reasoning_gym"])


class Lengths(BatchReward):
    """Judges a batch; one text fails."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.closed = self.started = 0

    def judge(self, samples: Any) -> list[float | Verdict | Exception]:
        self.batches.append(len(samples))
        return [
            KeyError(s.text) if s.text == "bad" else Verdict(len(s.text), True, {"n": 1.0})
            for s in samples
        ]

    def start(self) -> None:
        self.started += 1

    def close(self) -> None:
        self.closed += 1


def test_rewards_are_weighted_and_one_decides() -> None:
    lengths = Lengths()
    both = WeightedRewards(
        {"length": lengths, "task": lambda s: 1.0 if s.text == "abc" else 0.25},
        correct="task",
        weights={"length": 0.5},
    )
    got = judge(both, [sample("abc"), sample("bad"), sample("")])
    assert got[0] == Verdict(2.5, True, {"length": 3.0, "length.n": 1.0, "task": 1.0})
    assert isinstance(got[1], KeyError)
    assert got[2] == Verdict(0.25, False, {"length": 0.0, "length.n": 1.0, "task": 0.25})
    assert lengths.batches == [3]
    assert list(walk(both)) == [both, *both.children()]
    runner = RewardRunner(both)
    runner.start()
    runner.close()
    assert (lengths.started, lengths.closed) == (1, 1)
    assert both(sample("abc")) == got[0]
    with pytest.raises(KeyError, match="bad"):
        both(sample("bad"))


def test_the_first_reward_decides_unless_another_is_named() -> None:
    rewards: dict[str, Any] = {"a": lambda s: 1.0, "b": lambda s: 0.0}
    assert WeightedRewards(rewards)(sample()) == Verdict(1.0, True, {"a": 1.0, "b": 0.0})
    assert WeightedRewards(rewards, correct="b")(sample()).correct is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rewards": {}}, "`rewards` must have at least one reward: got none"),
        ({"correct": "c"}, "`correct` must be one of a: got c"),
        ({"weights": {"c": 1.0}}, "`weights` must name only a: got c"),
        ({"weights": {"a": float("nan")}}, "`weights` must be finite: got nan for a"),
    ],
)
def test_compositions_that_cannot_be_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        WeightedRewards(**{"rewards": {"a": lambda s: 1.0}, **arguments})
    with pytest.raises(ConfigurationError, match="`rewards` must have at least one reward"):
        RoutedReward({})


def test_each_row_goes_to_the_reward_of_its_source() -> None:
    lengths = Lengths()
    routed = RoutedReward({"a": lengths, "b": lambda s: 0.5})
    rows = [("a", "x"), ("b", "xx"), ("c", "xxx"), ("a", "xxxx")]
    got = judge(routed, [sample(text, source=name) for name, text in rows])
    assert got[0] == Verdict(1.0, True, {"n": 1.0}) and got[3] == Verdict(4.0, True, {"n": 1.0})
    assert got[1] == Verdict(0.5, False)
    assert repr(got[2]) == """KeyError("no reward for source 'c'")"""
    assert lengths.batches == [2] and len(list(walk(routed))) == 3


class Short(TaskReward):
    """Returns fewer verdicts than it was asked for; breaks down on one text."""

    def __call__(self, sample: Sample) -> float:
        return 1.0

    def judge(self, samples: Any) -> list[float | Verdict | Exception]:
        if samples[0].text == "break":
            raise OSError("broken")
        return [1.0]


def test_a_batch_that_breaks_fails_for_each_sample() -> None:
    assert [repr(r) for r in judge(Short(), [sample("break")] * 2)] == ["OSError('broken')"] * 2
    short = judge(Short(), [sample()] * 2)
    assert [repr(r) for r in short] == ["ValueError('1 results for 2 samples')"] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", None])
def test_a_part_that_is_no_number_is_a_failure(value: Any) -> None:
    (result,) = judge(lambda s: Verdict(1.0, True, {"part": value}), [sample()])
    assert isinstance(result, Exception)


def test_parts_do_not_make_a_verdict_unhashable() -> None:
    assert len({Verdict(1.0, True, {"a": 1.0}), Verdict(1.0, True, {"a": 1.0})}) == 1
