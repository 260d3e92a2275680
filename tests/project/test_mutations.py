"""The mutations fit the code, and their page the list; running them all takes minutes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutations import MUTATIONS, PAGE, Mutation, page

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_is_an_edit_of_one_place(mutation: Mutation) -> None:
    source, tests = mutation.where
    assert (ROOT / "kdrl_lightning" / source).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert (ROOT / "tests" / tests).is_file()


def test_names_tell_mutations_apart() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


def test_the_page_names_all_of_them_and_none_survived() -> None:
    rows = re.findall(r"^\| (.+) \| `([\w/.]+)` (test_\w+) \|$", PAGE.read_text(), re.M)
    assert sorted(name for name, _, _ in rows) == sorted(m.name for m in MUTATIONS)
    for _, file, test in rows:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test


def test_a_page_is_made_file_by_file() -> None:
    rows = [(m, "test_it") for m in (MUTATIONS[0], MUTATIONS[-1])]
    text = page(rows)
    assert "in 2 ways" in text
    assert text.count("| broken |") == 2
    assert f"| {MUTATIONS[0].name} | `{MUTATIONS[0].where[1]}` test_it |" in text


def test_the_readme_counts_them() -> None:
    (count,) = re.findall(r"breaks the maths in (\d+) ways", (ROOT / "README.md").read_text())
    assert int(count) == len(MUTATIONS)
