"""Odd completions that students sample: every reward judges them, or counts them as wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from helpers.rewards import judged_elsewhere
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts import ReasoningGymPrompts
from kdrl_lightning.rewards import (
    CodeReward,
    ExactMatch,
    FormatReward,
    KnightsAndKnavesReward,
    LengthPenalty,
    MathReward,
    ReasoningGymReward,
    RewardFunction,
    RewardRunner,
    RoutedReward,
    Sample,
    WeightedRewards,
)
from kdrl_lightning.rewards.answers.extraction import answer_of
from kdrl_lightning.rewards.base import Verdict
from kdrl_lightning.rewards.processes.sandbox import require_sandbox

ODD = {
    "empty": "",
    "blank": " \n\t\u2003",
    "a megabyte": "x" * (1 << 20),
    "a megabyte of blanks": " " * (1 << 20),
    "a megabyte of words": "Emma is a " * 100_000,
    "a megabyte of tags": "<answer>" * 130_000,
    "nul": "4\x002",
    "half a surrogate pair": "42\ud83d",
    "right to left": "\u202e24 \u05d0\u05d1",
    "combining": "e\u0301" * 50,
}
FRAMES = {
    "bare": "{}",
    "marked": "#### {}",
    "boxed": r"\boxed{{{}}}",
    "tagged": "<think>{0}</think><answer>{0}</answer>",
    "code": "```python\n{}\n```",
}
try:
    require_sandbox()
    CODE: dict[str, Any] = {"code": CodeReward()}
except ConfigurationError:
    CODE = {}
REWARDS: dict[str, Any] = {
    "exact": ExactMatch(),
    "marker": ExactMatch("####"),
    "format": FormatReward(),
    "knights": KnightsAndKnavesReward(),
    "length": LengthPenalty(8, 2),
    "math": MathReward(workers=1, time_limit_s=60.0),
    "math marker": MathReward("####", workers=1, time_limit_s=60.0),
    "gym": ReasoningGymReward(workers=1, time_limit_s=60.0),
    "function": RewardFunction(judged_elsewhere.odd, workers=1, time_limit_s=60.0),
    **CODE,
}
REWARDS["sum"] = WeightedRewards({"a": REWARDS["exact"], "b": REWARDS["format"]})
REWARDS["routed"] = RoutedReward({"here": REWARDS["marker"]})


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    for reward in REWARDS.values():
        reward.close()


@pytest.mark.parametrize("name", REWARDS)
def test_odd_completions_are_judged(name: str) -> None:
    row = {**ReasoningGymPrompts("chain_sum", size=1)[0], "source": "here", "tests": "assert x"}
    row["answer"] = "Emma is a knight" if name == "knights" else "42"
    samples = [Sample(f.format(text), [0], row) for text in ODD.values() for f in FRAMES.values()]
    runner = RewardRunner(REWARDS[name])
    verdicts = runner(samples)
    assert runner.failures == 0
    right = {s.text for s, v in zip(samples, verdicts, strict=True) if v.correct}
    blank = FRAMES["tagged"].format("")
    if name == "format":
        assert blank in right and ODD["empty"] not in right
    elif name == "function":
        assert len(right) == len(samples)  # it gets each text as it is
    else:
        assert not right
    for sample in samples:
        answer_of(REWARDS[name], sample)


@pytest.mark.parametrize("case", [c for c, t in ODD.items() if len(t) < 1000 and t.strip()])
def test_an_odd_answer_that_is_the_reference_is_right(case: str) -> None:
    text = ODD[case]
    row = {"answer": text}
    assert ExactMatch()(Sample(f" {text}\n", [], row)) == 1.0
    assert ExactMatch("####")(Sample(f"#### {text}", [], row)) == 1.0
    assert Verdict.of(MathReward()(Sample(rf"\boxed{{{text}}}", [], row))).correct
