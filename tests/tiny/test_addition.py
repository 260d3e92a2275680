"""The embedded task against Python's own addition."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards import Sample
from kdrl_lightning.tiny.addition import (
    SYMBOLS,
    AdditionTraces,
    ColumnAddition,
    addition_reward,
    worked_answer,
)

NUMBERS = st.integers(1, 9).flatmap(
    lambda digits: st.tuples(
        st.integers(0, 10**digits - 1), st.integers(0, 10**digits - 1), st.just(digits)
    )
)
many = settings(derandomize=True, max_examples=300, deadline=None)


def parts(trace: str) -> tuple[list[int], str]:
    """Column sums, least significant first, and the result as it is written."""
    columns, result = trace.split("#")
    return [int(c) for c in columns.split(",")], result


def school(a: int, b: int, digits: int, forget: list[bool]) -> tuple[list[int], str]:
    """Addition as at school, from the written digits."""
    top, bottom = str(a).zfill(digits)[::-1], str(b).zfill(digits)[::-1]
    sums, carry = [], 0
    for i in range(digits):
        sums.append(int(top[i]) + int(bottom[i]) + carry)
        carry = 1 if sums[-1] > 9 else 0
        if i < len(forget) and forget[i]:
            carry = 0
    return sums, str(carry) + "".join(str(s)[-1] for s in sums[::-1])


@many
@given(NUMBERS)
def test_the_result_is_the_sum(case):
    a, b, digits = case
    result = parts(worked_answer(a, b, digits))[1]
    assert int(result) == a + b
    assert len(result) == digits + 1


@pytest.mark.parametrize("digits", [1, 2])
def test_every_small_sum_is_right(digits):
    for a, b in itertools.product(range(10**digits), repeat=2):
        assert int(parts(worked_answer(a, b, digits))[1]) == a + b


@many
@given(NUMBERS)
def test_columns_are_the_sums_with_carries(case):
    a, b, digits = case
    columns = parts(worked_answer(a, b, digits))[0]
    for i, column in enumerate(columns):
        below = 10**i
        carry = (a % below + b % below) // below
        assert column == a // below % 10 + b // below % 10 + carry


@many
@given(NUMBERS, st.data())
def test_forgotten_carries_are_those_that_were_flagged(case, data):
    a, b, digits = case
    forget = data.draw(st.lists(st.booleans(), min_size=digits - 1, max_size=digits - 1))
    assert parts(worked_answer(a, b, digits, forget)) == school(a, b, digits, forget)


@many
@given(NUMBERS)
def test_forgetting_nothing_is_the_right_trace(case):
    a, b, digits = case
    assert worked_answer(a, b, digits, [False] * (digits - 1)) == worked_answer(a, b, digits)


@many
@given(NUMBERS)
def test_traces_have_one_length_and_use_the_symbols_alone(case):
    a, b, digits = case
    trace = worked_answer(a, b, digits)
    assert len(trace) == 3 * digits - 1 + 1 + digits + 1
    assert set(trace) <= set(SYMBOLS)


def test_a_trace_written_by_hand():
    # 9+8=17, carry; 9+0+1=10, carry; 0+0+1=1; 0+5=5.
    assert worked_answer(99, 5008, 4) == "17,10,01,05#05107"
    assert worked_answer(99, 5008, 4, [True, False, False]) == "17,09,00,05#05097"
    assert worked_answer(9999, 1, 4) == "10,10,10,10#10000"
    assert worked_answer(9, 9, 1) == "18#18"


def numbers(prompt: str) -> tuple[int, int]:
    left, right = prompt.removesuffix("=").split("+")
    return int(left), int(right)


@pytest.mark.parametrize("digits", [1, 3, 4, 9])
def test_problems_have_right_answers_of_fixed_width(digits):
    source = ColumnAddition(size=300, seed=2, digits=digits)
    for row in (source[i] for i in range(len(source))):
        a, b = numbers(row["prompt"])
        assert int(row["answer"]) == a + b
        assert len(row["answer"]) == digits + 1
        assert len(row["prompt"]) == 2 * digits + 2
        assert set(row["prompt"]) <= set(SYMBOLS)


def test_a_problem_depends_on_seed_and_index_alone():
    small, large = ColumnAddition(3, seed=5), ColumnAddition(1000, seed=5)
    assert [small[i] for i in range(3)] == [large[i] for i in range(3)]
    assert small[2] == small[2]


def test_seeds_and_indices_give_other_problems():
    prompts = {ColumnAddition(50, seed)[i]["prompt"] for seed in range(4) for i in range(50)}
    assert len(prompts) >= 198


def test_a_source_can_be_iterated_to_its_end():
    assert len(list(ColumnAddition(7))) == 7 == len(ColumnAddition(7))
    assert len(list(AdditionTraces(7))) == 7 == len(AdditionTraces(7))


@pytest.mark.parametrize("source", [ColumnAddition(5), AdditionTraces(5)])
@pytest.mark.parametrize("index", [5, -1, 99])
def test_an_index_outside_is_refused(source, index):
    with pytest.raises(IndexError, match=rf"^`index` must be in \[0, 4\]: got {index}$"):
        source[index]


def test_traces_are_of_the_same_problems():
    problems, traces = ColumnAddition(40, 3), AdditionTraces(40, 3, slip=0.5)
    assert [problems[i]["prompt"] for i in range(40)] == [traces[i]["prompt"] for i in range(40)]


def test_solutions_are_a_column_more():
    plain, solved = ColumnAddition(20, 3), ColumnAddition(20, 3, solutions=True)
    for row, more in zip(plain, solved, strict=True):
        right = worked_answer(*numbers(row["prompt"]), 4)
        assert more == {**row, "solution": right} and addition_reward(Sample(right, [], more))


@pytest.mark.parametrize("shown", [0.0, 0.4, 1.0])
def test_shown_answers_are_right_and_copied(shown):
    plain = list(AdditionTraces(300, 2, slip=0.9))
    rows = list(AdditionTraces(300, 2, slip=0.9, shown=shown))
    seen = 0
    for row, without in zip(rows, plain, strict=True):
        right = worked_answer(*numbers(without["prompt"]), 4)
        if row != without:
            assert row == {"prompt": f"{right}#{without['prompt']}", "completion": right}
            seen += 1
    assert seen / 300 == pytest.approx(shown, abs=0.1)


@pytest.mark.parametrize("digits", [1, 4])
def test_slip_0_is_the_right_trace(digits):
    source = AdditionTraces(200, 1, digits, slip=0.0)
    for row in source:
        assert row["completion"] == worked_answer(*numbers(row["prompt"]), digits)


@pytest.mark.parametrize("digits", [1, 4])
def test_slip_1_forgets_every_carry_between_columns(digits):
    for row in AdditionTraces(200, 1, digits, slip=1.0):
        a, b = numbers(row["prompt"])
        columns, result = school(a, b, digits, [True] * (digits - 1))
        assert parts(row["completion"]) == (columns, result)
        assert columns == [a // 10**i % 10 + b // 10**i % 10 for i in range(digits)]


def test_slip_forgets_its_share_of_the_carries():
    # 3 flags for each of 2000 problems; a flag shows where its column carries.
    shown = forgotten = 0
    for row in AdditionTraces(2000, 0, 4, slip=0.3):
        a, b = numbers(row["prompt"])
        columns = parts(row["completion"])[0]
        for i in range(3):
            if columns[i] > 9:
                shown += 1
                plain = a // 10 ** (i + 1) % 10 + b // 10 ** (i + 1) % 10
                forgotten += columns[i + 1] == plain
    # Five standard errors.
    assert forgotten / shown == pytest.approx(0.3, abs=5 * (0.21 / shown) ** 0.5)


def test_a_larger_slip_forgets_at_least_the_same_carries():
    weak, strong = AdditionTraces(300, 0, slip=0.3), AdditionTraces(300, 0, slip=0.8)
    for low, high in zip(weak, strong, strict=True):
        right = worked_answer(*numbers(low["prompt"]), 4)
        assert low["completion"] == right or high["completion"] != right


def test_traces_are_deterministic():
    rows = list(AdditionTraces(50, 7, slip=0.5))
    assert rows == list(AdditionTraces(50, 7, slip=0.5))
    assert rows != list(AdditionTraces(50, 8, slip=0.5))


def reward(text: str, answer: str = "06912") -> float:
    return addition_reward(Sample(text, [], {"answer": answer}))


def test_right_traces_are_rewarded_and_slipped_ones_not():
    rng = random.Random(0)
    for _ in range(200):
        a, b = rng.randrange(10**4), rng.randrange(10**4)
        answer = f"{a + b:05d}"
        forget = [rng.random() < 0.5 for _ in range(3)]
        slipped = worked_answer(a, b, 4, forget)
        assert reward(worked_answer(a, b, 4), answer) == 1.0
        assert reward(slipped, answer) == float(slipped == worked_answer(a, b, 4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#06912", 1.0),
        ("anything#06912", 1.0),
        ("06912", 0.0),
        ("#6912", 0.0),
        ("#06912 ", 0.0),
        ("#06912#", 0.0),
        ("##06912", 0.0),
        ("#1#06912", 0.0),
        ("#", 0.0),
        ("", 0.0),
    ],
)
def test_the_answer_follows_the_only_mark(text, expected):
    assert reward(text) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 0, 1), r"^`a` must have at most 1 digits and no sign: got 10\. Pass .* 0 to 9\.$"),
        ((0, 100, 2), r"^`b` must have at most 2 digits and no sign: got 100\."),
        ((-1, 0, 2), r"^`a` must have at most 2 digits and no sign: got -1\."),
        ((0, 0, 0), r"^`digits` must be at least 1: got 0\. Pass a whole number from 1 on\.$"),
        (
            (1, 1, 3, [True]),
            r"^`forget` must have one flag for each column but the last: got 1\. Pass 2 flags\.$",
        ),
        ((1, 1, 1, [True]), r"got 1\. Pass 0 flags"),
    ],
)
def test_worked_answer_refuses_what_does_not_fit(arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        worked_answer(*arguments)


@pytest.mark.parametrize("source", [ColumnAddition, AdditionTraces])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 0}, r"^`size` must be at least 1: got 0\."),
        ({"seed": -1}, r"^`seed` must be at least 0: got -1\."),
        ({"digits": 0}, r"^`digits` must be at least 1: got 0\."),
    ],
)
def test_sources_refuse_bad_values(source, arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        source(**arguments)


def test_shown_is_a_probability():
    with pytest.raises(ConfigurationError, match=r"^`shown` must be in \[0, 1\]: got 1\.5\.$"):
        AdditionTraces(shown=1.5)


@pytest.mark.parametrize("slip", [-0.1, 1.1, float("nan")])
def test_slip_is_a_probability(slip):
    words = rf"^`slip` must be in \[0, 1\]: got {slip}\. Pass the probability"
    with pytest.raises(ConfigurationError, match=words):
        AdditionTraces(slip=slip)
