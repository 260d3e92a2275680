"""Generated tasks: exact by seed, and puzzles with one solution."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts import KnightsAndKnavesPrompts, ReasoningGymPrompts


def rows(source: ReasoningGymPrompts) -> list[dict[str, Any]]:
    return [source[i] for i in range(len(source))]


def test_rows_follow_from_the_seed() -> None:
    first = rows(ReasoningGymPrompts("chain_sum", size=20, seed=1))
    assert rows(ReasoningGymPrompts("chain_sum", size=20, seed=1)) == first
    assert rows(ReasoningGymPrompts("chain_sum", size=9, seed=1)) == first[:9]
    # Not one item apart, as reasoning-gym's own neighbouring seeds are.
    other = {row["question"] for row in rows(ReasoningGymPrompts("chain_sum", size=20, seed=2))}
    assert not other & {row["question"] for row in first}


def test_difficulty_and_form() -> None:
    config = {"min_terms": 7, "max_terms": 7}
    source = ReasoningGymPrompts("chain_sum", size=3, config=config, chat=True, suffix=" Go.")
    for row in rows(source):
        assert row["metadata"]["difficulty"]["num_terms"] == (7, 7)
        assert row["prompt"] == [{"role": "user", "content": row["question"] + " Go."}]
        assert isinstance(row["answer"], str)


def test_there_is_no_row_behind_the_last() -> None:
    source = ReasoningGymPrompts("chain_sum", size=3)
    for index in (3, -1):
        with pytest.raises(IndexError):
            source[index]


BAD = {
    "task": (
        {"task": "chain_sums"},
        r"`task` must be .*: got chain_sums\. Did you mean chain_sum",
    ),
    "far task": ({"task": "?"}, r"`task` must be .*: got \?\. It has \d+, e\.g\. chain_sum\."),
    "argument": ({"config": {"foo": 1}}, r"`config` must be .* chain_sum accepts: got .* 'foo'"),
    "value": ({"config": {"min_terms": -1}}, r"`config` must be .*: got \{'min_terms': -1\} \("),
    "size": ({"size": 0}, r"`size` must be in \[1, 1e\+07\]: got 0\."),
    "seed": ({"seed": -1}, r"`seed` must be at least 0: got -1\."),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(case: str) -> None:
    arguments, words = BAD[case]
    with pytest.raises(ConfigurationError, match=rf"^{words}") as caught:
        ReasoningGymPrompts(**{"task": "chain_sum", **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def true(statement: Any, honest: tuple[bool, ...]) -> bool:
    """Whether a statement holds, written from its words."""
    word, *parts = statement
    if word in ("telling-truth", "lying"):
        return honest[parts[0]] == (word == "telling-truth")
    values = [true(part, honest) for part in parts]
    return {
        "not": lambda: not values[0],
        "and": lambda: all(values),
        "or": lambda: any(values),
        "->": lambda: values[1] or not values[0],
        "<=>": lambda: values[0] == values[1],
    }[word]()


@pytest.mark.parametrize("people", range(2, 9))
def test_a_puzzle_has_one_solution_by_brute_force(people: int) -> None:
    for row in rows(KnightsAndKnavesPrompts(people, size=6, seed=people, width=3)):
        said, names = row["metadata"]["statements"], row["metadata"]["names"]
        assert len(said) == people
        fits = [
            honest
            for honest in itertools.product((True, False), repeat=people)
            if all(true(statement, honest) == honest[i] for i, statement in enumerate(said))
        ]
        assert len(fits) == 1
        terms = row["metadata"]["knight_knave_terms"]
        roles = [terms["knight"] if honest else terms["knave"] for honest in fits[0]]
        told = re.findall(r"(\w+) is an? (\w+)", row["answer"])
        assert told == list(zip(names, roles, strict=True))
        assert all(name in row["prompt"] for name in names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"people": 1}, r"`people` must be in \[2, 8\]: got 1\."),
        ({"people": 9}, r"`people` must be in \[2, 8\]: got 9\."),
        ({"depth": 1}, r"`depth` must be at least 2: got 1\."),
        ({"width": 1}, r"`width` must be at least 2: got 1\."),
    ],
)
def test_puzzles_that_cannot_be_are_refused(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        KnightsAndKnavesPrompts(**arguments)  # type: ignore[arg-type]
