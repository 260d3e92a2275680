"""majority@k compares the answer on which the verdict is based, for every reward with answers."""

from __future__ import annotations

import pytest

from kdrl_lightning import EvalSet, ExactMatch
from kdrl_lightning.engines import Completion
from kdrl_lightning.evaluation import EvaluationBatch, named_sets
from kdrl_lightning.evaluation.majority import majority_at_k
from kdrl_lightning.evaluation.sets import EvaluationSettings
from kdrl_lightning.prompts import ReasoningGymPrompts
from kdrl_lightning.rewards import (
    CodeReward,
    FormatReward,
    KnightsAndKnavesReward,
    LengthPenalty,
    MathReward,
    ReasoningGymReward,
    Reward,
    RewardFunction,
    RoutedReward,
    Sample,
    Verdict,
)
from kdrl_lightning.rewards.answers.extraction import answer_of
from kdrl_lightning.rollout.generation import Judged

PEOPLE = "Emma is a knight, and Liam is a knave."
PROGRAM = "```python\nprint({})\n```"


def formed(answer: str) -> str:
    return f"<think>so</think><answer>{answer}</answer>"


# A reward, two texts with one answer, one with another, and what has none.
CASES = {
    "exact": (ExactMatch(marker="#"), ("so # 42", "hence #42 "), "# 41", "42"),
    "math": (MathReward(), (r"so \boxed{42}", r"\boxed{$042.$}"), r"\boxed{41}", "42"),
    "words": (MathReward(), (r"\boxed{\text{Yes}}", r"\boxed{yes}"), r"\boxed{no}", "yes"),
    "marker": (MathReward("####"), ("#### 42\nDone", "x\n#### +42"), "#### 41", r"\boxed{42}"),
    "gym": (ReasoningGymReward(), (formed("42"), "<answer> 42 </answer>"), formed("41"), "42"),
    "gym marker": (ReasoningGymReward("#"), ("so # 42", "#42"), "# 41", formed("42")),
    "knights": (
        KnightsAndKnavesReward(),
        (formed(PEOPLE), formed("liam is a KNAVE; Emma is a knight")),
        formed("Emma is a knave, Liam is a knave"),
        formed("Emma is a knight"),
    ),
    "format": (FormatReward(), (formed("42"), formed(" 42 ") + "\n"), formed("41"), "42"),
    "code": (
        CodeReward(),
        (PROGRAM.format(42), "so\n" + PROGRAM.format(42) + "\nDone"),
        PROGRAM.format(41),
        "print(42)",
    ),
    "length": (LengthPenalty(8, 2), ("42", " 42 "), "41", None),
    "function": (RewardFunction(len, time_limit_s=None), ("42", " 42 "), "41", None),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_answers_are_equal_texts(name: str) -> None:
    reward, same, other, none = CASES[name]
    row = {"answer": PEOPLE}
    one, again, different = (answer_of(reward, Sample(t, [], row)) for t in (*same, other))
    assert one is not None and one == again and different not in (one, None)
    if none is not None:
        assert answer_of(reward, Sample(none, [], row)) is None
    routed = RoutedReward({"here": reward})
    assert answer_of(routed, Sample(same[0], [], {**row, "source": "here"})) == one


def vote(reward: Reward, texts: list[str], correct: list[bool]) -> float:
    """majority@n of one prompt."""
    (of,) = named_sets(
        {"x": EvalSet([{"prompt": ""}], len(texts), 1.0)},
        "x",
        EvaluationSettings(temperature=1.0),
        8,
    )
    judged = [
        Judged([1], {"answer": "42"}, Completion([1], [0.0], False), text, Verdict(float(c), c))
        for text, c in zip(texts, correct, strict=True)
    ]
    batch = EvaluationBatch.from_judged(of, [0], judged, reward)
    return float(majority_at_k(batch.answer_ids, batch.correct, len(texts)))


def test_mathematics_is_decided_by_the_vote() -> None:
    texts = [r"so \boxed{42}", r"or \boxed{042}", r"no: \boxed{41}", "42"]
    assert vote(MathReward(), texts, [True, True, False, False]) == 1.0
    assert vote(MathReward(), texts[1:], [True, False, False]) == 0.5  # a tie
    # Equal by judgement only, they vote apart.
    texts = [r"\boxed{1/2}", r"\boxed{0.5}", r"\boxed{3}", r"\boxed{3}"]
    assert vote(MathReward(), texts, [True, True, False, False]) == 0.0


def test_an_answer_that_cannot_be_had_is_shown() -> None:
    row = ReasoningGymPrompts("chain_sum", size=1)[0]
    with pytest.warns(
        UserWarning,
        match=r"the reward's `answer` failed, so the completion does not vote: KeyError",
    ):
        assert answer_of(RoutedReward({"a": len}), Sample("", [], {**row, "source": "b"})) is None
