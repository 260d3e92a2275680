"""Answers that are the text of a list: a warning before training, and how to parse them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.prompts import JSONLPrompts, ParsedPrompts
from kdrl_lightning.rewards import (
    AnswerFeedback,
    ExactMatch,
    MathReward,
    Reward,
    RewardRunner,
    RoutedReward,
    Sample,
    WeightedRewards,
)

LISTS = ["['72', '73']", '["72","73"]', "['72' '73']", "('72', '73')", "{'73', '72'}"]
LISTS += ["array(['72', '73'], dtype=object)", "[np.str_('72'), np.str_('73')]", "['72',\n '73']"]


def warned(reward: Reward, rows: list[dict[str, Any]]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RewardRunner(reward).warn_of_lists(rows, "train_prompts")
    return [str(one.message) for one in caught]


REWARDS = {
    "exact": ExactMatch(),
    "marked": ExactMatch("#"),
    "math": MathReward(),
    "weighted": WeightedRewards({"a": lambda s: 1.0, "b": ExactMatch()}),
    "feedback": AnswerFeedback(ExactMatch()),
    "routed": RoutedReward({"x": ExactMatch(), "y": lambda s: 1.0}),
}


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("text", [*LISTS, "[72]", '{"ground_truth": "72"}'])
def test_the_text_of_a_list_is_one_warning(reward: Reward, text: str) -> None:
    rows = [{"prompt": "q", "answer": answer, "source": "x"} for answer in ("5", text, text)]
    (line,) = warned(reward, rows)
    assert line.startswith(
        "the answer of 2 of 3 checked rows of `train_prompts` is the text of a list or a dict, e.g."
        f" {text!r:.60}, and only a completion with this whole text is right. If each"
    )
    assert "ParsedPrompts (`columns: [answer]`)" in line


@pytest.mark.parametrize("text", ["72", "[x]", "(5)", "[0, 1)", "[]", "f[1]", "[[1, 2], [3, 4]]"])
def test_other_texts_are_no_lists(text: str) -> None:
    assert warned(ExactMatch(), [{"answer": text}]) == []


@pytest.mark.parametrize("text", ["(1, 2)", "[0, 1]", "[1, 2, 3]", r"\{1, 2\}", "{1, 2}"])
def test_intervals_points_sets_and_vectors_are_mathematics(text: str) -> None:
    assert warned(MathReward(), [{"answer": text}]) == []
    assert MathReward()(Sample(rf"\boxed{{{text}}}", [], {"answer": text})) == 1.0


def test_real_lists_and_rows_of_another_reward_give_no_warning() -> None:
    assert warned(ExactMatch(), [{"answer": ["72", "73"]}, {"answer": 5}, {"other": "[1]"}]) == []
    assert warned(REWARDS["routed"], [{"answer": "['72']", "source": "y"}]) == []


@pytest.mark.parametrize("text", ["[1, 2]", "['a', 'b']", "{'a': 1}"])
def test_an_answer_that_is_the_text_of_a_list_stays_right(text: str) -> None:
    assert ExactMatch()(Sample(text, [], {"answer": text})) == 1.0
    assert ExactMatch()(Sample("1", [], {"answer": text})) == 0.0


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize(
    "reward", [ExactMatch(), MathReward(marker="#"), AnswerFeedback(ExactMatch())]
)
def test_parsed_prompts_accept_each_entry(reward: Any, text: str) -> None:
    row = ParsedPrompts([{"prompt": "q", "answer": text}], columns=["answer"])[0]
    mark = "#" if isinstance(reward, MathReward) else ""
    values = [reward.judge([Sample(mark + one, [], row)])[0] for one in ("72", "73", "74")]
    assert [getattr(value, "reward", value) for value in values] == [1.0, 1.0, 0.0]
    assert warned(reward, [dict(row)]) == []


def test_a_run_warns_before_it_samples(tmp_path: Path, student_folder: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "1+2=", "answer": "[\'3\', \'03\']"}\n')
    texts = JSONLPrompts(str(tmp_path / "x.jsonl"))
    module = make_module(student_folder, None, GRPO())
    for source, count in ((texts, 1), (ParsedPrompts(texts, columns=["answer"]), 0)):
        data = make_data(val_prompts=source, reward=ExactMatch())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(tmp_path).validate(module, datamodule=data)
        found = [str(one.message) for one in caught if "text of a list" in str(one.message)]
        assert len(found) == count
        assert all(line.startswith("the answer of 1 of 1 checked rows of `val_p") for line in found)
