"""A row's answer in every type that data sets bring: accepted texts, or one line."""

from __future__ import annotations

import datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts import HFPrompts, ReasoningGymPrompts
from kdrl_lightning.rewards import (
    CodeReward,
    ExactMatch,
    KnightsAndKnavesReward,
    MathReward,
    RewardRunner,
    RoutedReward,
    Sample,
    TaskReward,
    WeightedRewards,
)
from kdrl_lightning.rewards.answers.references import accepted
from kdrl_lightning.rewards.code import read_tests
from kdrl_lightning.rewards.reasoning_gym import score
from kdrl_lightning.tiny import addition_reward


class NAType:
    """As pandas' NA: neither equal nor different, and without a truth."""

    def __ne__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


ANSWERS: list[tuple[Any, set[str]]] = [
    ("42", {"42"}),
    (" 42\n", {"42"}),
    ("None", {"None"}),
    (b"caf\xc3\xa9", {"café"}),
    (42, {"42"}),
    (np.int64(42), {"42"}),
    (72.0, {"72", "72.0"}),
    (-3.0, {"-3", "-3.0"}),
    (-0.0, {"0", "-0", "-0.0"}),
    (0.5, {"0.5"}),
    (0.1 + 0.2, {"0.3", "0.30000000000000004"}),
    (1e-7, {"1e-07", "0.0000001"}),
    (1e22, {"1e+22", "1" + "0" * 22}),
    (float("-inf"), {"-inf", "-\\infty"}),
    (np.float32(0.1), {"0.1"}),
    (np.float32(16777215), {"16777215", "16777215.0"}),
    (np.float16(0.1), {"0.1"}),
    (np.array(72.0), {"72", "72.0"}),
    (torch.tensor(3), {"3"}),
    (torch.tensor(0.1), {"0.1"}),
    (Decimal("72.50"), {"72.5", "72.50"}),
    (Decimal("1E+2"), {"100", "1E+2"}),
    (Fraction(1, 2), {"1/2"}),
    (True, {"True", "true"}),
    (np.bool_(False), {"False", "false"}),
    (["42", "forty-two"], {"42", "forty-two"}),
    (("a", None, float("nan"), "b"), {"a", "b"}),
    ({"b", "a"}, {"a", "b"}),
    (np.array(["a", "b"]), {"a", "b"}),
    (np.array([1.0, 2.5]), {"1", "1.0", "2.5"}),
    (datetime.date(2024, 1, 2), {"2024-01-02"}),
    (
        datetime.datetime(2024, 1, 2),
        {"2024-01-02 00:00:00", "2024-01-02T00:00:00", "2024-01-02"},
    ),
    (datetime.datetime(2024, 1, 2, 3), {"2024-01-02 03:00:00", "2024-01-02T03:00:00"}),
    (bytearray(b"42"), {"42"}),
    (memoryview(b"42"), {"42"}),
    (0.10000000149011612, {"0.10000000149011612", "0.100000001490116", "0.1"}),  # a float32
    (0.0999755859375, {"0.0999755859375", "0.1"}),  # a float16
    (-2.5, {"-2.5"}),
    (-3.140000104904175, {"-3.140000104904175", "-3.14000010490417", "-3.14"}),
    (0.1234567890123456, {"0.1234567890123456", "0.123456789012346"}),  # none
    (1234567936.0, {"1234567936", "1234567936.0"}),
    (0.0009765625, {"0.0009765625"}),
    (2.0**53, {"9007199254740992", "9007199254740992.0"}),  # not ...740990
    (np.longdouble(0.5), {"0.5"}),
    (torch.tensor(0.1, dtype=torch.bfloat16), {"0.1"}),
    (torch.tensor([3.14, 72.0], dtype=torch.bfloat16), {"3.14", "72", "72.0"}),
    (torch.tensor(72.0).to(torch.float8_e4m3fn), {"72", "72.0"}),
    (torch.tensor(0.5, requires_grad=True), {"0.5"}),
    (np.complex64(0.1 + 2j), {"(0.1+2j)"}),
    (
        np.datetime64("2024-01-02T03", "ns"),
        {"2024-01-02 03:00:00", "2024-01-02T03:00:00"},
    ),
    (np.datetime64("2024-01-02T00:00:00.000000001"), {"2024-01-02T00:00:00.000000001"}),
    (np.array(["2024-01"], dtype="datetime64[M]"), {"2024-01"}),
    (np.datetime64("2024-01-02"), {"2024-01-02"}),
    ("72\u200b\n", {"72\u200b", "72"}),
    ("cafe\u0301", {"cafe\u0301", "caf\u00e9"}),
]


@pytest.mark.parametrize(
    ("answer", "texts"),
    ANSWERS,
    ids=[f"{i}-{type(a).__name__}" for i, (a, _) in enumerate(ANSWERS)],
)
def test_what_a_row_accepts(answer: Any, texts: set[str]) -> None:
    assert set(accepted({"answer": answer})) == texts
    for text in texts:
        assert ExactMatch()(Sample(text, [], {"answer": answer})) == 1.0
    assert ExactMatch()(Sample("something else", [], {"answer": answer})) == 0.0


@given(st.floats(-1e300, 1e300))
def test_every_text_of_a_float_is_that_float(value: float) -> None:
    for text in accepted({"answer": value}):
        assert float(text) == pytest.approx(value, rel=1e-14, abs=1e-320)
    assert value in {float(text) for text in accepted({"answer": value})}
    assert "e" not in accepted({"answer": value})[0]


MISSING = [None, float("nan"), np.float32("nan"), "", "  ", b"", [], [None], np.array([])]
MISSING += [
    np.ma.array(1, mask=True),
    Decimal("NaN"),
    Decimal("sNaN"),
    np.ma.masked,
    np.datetime64("NaT"),
    NAType(),
]


@pytest.mark.parametrize(
    "answer", MISSING, ids=[f"{i}-{type(a).__name__}" for i, a in enumerate(MISSING)]
)
@pytest.mark.parametrize("text", ["None", "nan", "", "NaT", "[]", "NA"])
def test_a_missing_answer_is_never_right_and_names_its_row(answer: Any, text: str) -> None:
    row = {"prompt": "6*7=", "answer": answer}
    words = r"^a row must have an answer, but its `answer` is empty: got .* in the row .*6\*7=.*Add"
    for reward in (ExactMatch(), MathReward()):
        with pytest.raises(ConfigurationError, match=words):
            reward(
                Sample(
                    f"\\boxed{{{text}}}" if reward.answer(Sample(text, [], row)) is None else text,
                    [],
                    row,
                )
            )
        with pytest.raises(ConfigurationError, match=words):
            RewardRunner(reward).check([{**row, "answer": "1"}, row])
    with pytest.raises(
        ConfigurationError, match="`answer` must name the role of each inhabitant once"
    ):
        KnightsAndKnavesReward()(Sample(text, [], row))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"ground_truth": "42"}, "a dict"),
        ([["42"]], "a list inside a list"),
        (object(), "a object"),
        (b"\xff", "'utf-8' codec"),
        (np.timedelta64(3, "ns"), r"a timedelta64 \(np.timedelta64\(3,'ns'\)\)"),
        (np.zeros(1, dtype=[("a", int), ("b", int)])[0], "a void"),
        (np.zeros((40, 40)), "a ndarray inside a list"),  # printed in many lines
        pytest.param(10**5000, "Exceeds the limit .* that cannot be printed", id="huge"),
        (torch.zeros((), device="meta"), "Tensor.item"),
    ],
)
def test_an_answer_without_a_text_is_one_line(answer: Any, found: str) -> None:
    words = rf"^`answer` must be a text, a number, or a list of them: got {found}.* in the row "
    with pytest.raises(ConfigurationError, match=words) as caught:
        accepted({"answer": answer})
    assert "\n" not in str(caught.value)


def test_a_csv_with_an_empty_cell_keeps_its_whole_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,answer\na,72\nb,\nc,8\n")
    rows = HFPrompts(str(tmp_path / "x.csv"))
    assert rows[0]["answer"] == 72.0  # the library reads the column as floats
    runner = RewardRunner(ExactMatch())
    assert [v.reward for v in runner([Sample("72", [], rows[0]), Sample("8", [], rows[2])])] == [
        1,
        1,
    ]
    with pytest.raises(
        ConfigurationError, match=r"its `answer` is empty: got None in the row .*'b'"
    ):
        runner.check(rows[i] for i in range(len(rows)))


def test_a_run_with_a_row_without_an_answer_does_not_start(
    tmp_path: Path, student_folder: str
) -> None:
    rows = [{"prompt": "1+2=", "answer": 3.0}, {"prompt": "2+2=", "answer": float("nan")}]
    module, data = (
        make_module(student_folder, None, GRPO()),
        make_data(train_prompts=rows, val_prompts=None, reward=ExactMatch()),
    )
    words = r"its `answer` is empty: got nan in the row .*'prompt': '2\+2='.*Add the answer"
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(tmp_path).fit(module, datamodule=data)
    assert data.rollouts.plan is None


def test_any_of_several_answers_is_right_for_every_reward() -> None:
    marked = {"answer": ["so #### 4", "#### four"]}
    assert ExactMatch("####")(Sample("#### four", [], marked)) == 1.0
    assert ExactMatch("####")(Sample("#### so", [], marked)) == 0.0
    with pytest.raises(
        ConfigurationError, match=r"^`answer` must have an answer after '####': got"
    ):
        ExactMatch("####")(Sample("", [], {"answer": "so 4 ####"}))
    people = ["Emma is a knight, Liam is a knave", "Emma is a knave, Liam is a knave"]
    for answer, right in (
        (people[0], True),
        (people[1], True),
        ("Emma is a knave, Liam is a knight", False),
    ):
        text = f"<think></think><answer>{answer}</answer>"
        assert KnightsAndKnavesReward()(Sample(text, [], {"answer": people})).correct is right
    assert addition_reward(Sample("1#7", [], {"answer": ["8", "7"]})) == 1.0
    math = MathReward(workers=1)
    texts = [r"\boxed{1/2}", r"\boxed{2x}", r"\boxed{3}", r"\boxed{yes}"]
    samples = [Sample(text, [], {"answer": ["0.5", "x+x", "Yes"]}) for text in texts]
    assert math.judge(samples) == [1.0, 1.0, 0.0, 1.0]
    assert math.judge([Sample(r"\boxed{7}", [], {"answer": 7.0})]) == [1.0]
    math.close()


def test_a_scorer_of_reasoning_gym_gets_texts() -> None:
    row = ReasoningGymPrompts("chain_sum", size=1)[0]
    number = int(row["answer"])
    assert score((None, row["answer"], {**row, "answer": float(number)})) == 1.0
    assert score((None, row["answer"], {**row, "answer": [number + 1, number]})) == 1.0
    assert score((None, str(number + 2), {**row, "answer": [number + 1, number]})) < 1.0


def test_rows_are_looked_at_by_the_reward_that_judges_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CodeReward, "_passes", lambda *_: False)  # it needs a sandbox
    routed = RoutedReward({"a": ExactMatch(), "1": CodeReward(), "c": len})
    both = WeightedRewards({"all": routed, "length": lambda s: 0.0})
    good = [{"source": "a", "answer": "1"}, {"source": 1, "tests": "assert 1"}, {"source": "c"}]
    RewardRunner(both).check([*good, {"source": None}])
    with pytest.raises(ConfigurationError, match="its `answer` is empty"):
        RewardRunner(both).check([*good, {"source": "a", "answer": None}])
    words = r"^`reward` must be able to judge every row: got ValueError: tests must be .* Fix the"
    with pytest.raises(ConfigurationError, match=words):
        RewardRunner(both).check([{"source": 1, "tests": None}])
    RewardRunner(lambda s: 0.0).check([{"answer": None}])  # a function looks at no rows


def test_a_numeric_source_finds_its_reward() -> None:
    routed = RoutedReward({"1": lambda s: 0.5})
    assert routed(Sample("", [], {"source": 1})).reward == 0.5  # type: ignore[union-attr]
    assert routed.answer(Sample(" x ", [], {"source": 1})) == "x"
    assert isinstance(routed.judge([Sample("", [], {"source": None})])[0], KeyError)


def test_tests_from_parquet_are_arrays() -> None:
    tests: Any = np.array(["assert True"], dtype=object)
    assert read_tests(tests) == "assert True"
    assert isinstance(CodeReward(), TaskReward)


def test_a_float32_column_keeps_its_short_numbers(tmp_path: Path) -> None:
    import pandas as pd

    values = np.array([0.1, 2.5, 1e-7], dtype="float32")
    pd.DataFrame({"prompt": ["a", "b", "c"], "answer": values}).to_parquet(tmp_path / "x.parquet")
    rows = HFPrompts(str(tmp_path / "x.parquet"))
    for i, text in enumerate(("0.1", "2.5", "0.0000001")):
        assert ExactMatch()(Sample(text, [], rows[i])) == 1.0


def test_a_csv_keeps_leading_zeros(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,answer,level\na,007,3\nb,10,4\nc,,5\n")
    rows = HFPrompts(str(path))
    assert [rows[i]["answer"] for i in range(3)] == ["007", "10", None]
    assert rows[0]["level"] == 3
    assert ExactMatch()(Sample("007", [], rows[0])) == 1.0
    with pytest.raises(ConfigurationError, match="its `answer` is empty: got None"):
        ExactMatch().check(rows[2])


@pytest.mark.parametrize(
    ("value", "name"),
    [(1.0, "1"), (np.int64(1), "1"), (True, "true"), (True, "True"), (b"a", "a"), ("1.0", "1.0")],
)
def test_a_route_is_found_whatever_the_columns_type(value: Any, name: str) -> None:
    routed = RoutedReward({name: ExactMatch(), "other": len})
    row = {"answer": "42", "source": value}
    (result,) = routed.judge([Sample("42", [], row)])
    assert result.reward == 1.0 and routed.answer(Sample("42", [], row)) == "42"
    with pytest.raises(ConfigurationError, match="its `answer` is empty"):
        routed.check({**row, "answer": None})


def test_a_route_named_by_a_number_is_checked() -> None:
    routed = RoutedReward({1: ExactMatch()})  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match="its `answer` is empty"):
        routed.check({"answer": None, "source": 1})
    assert routed.judge([Sample("2", [], {"answer": "2", "source": 1.0})])[0].reward == 1.0
