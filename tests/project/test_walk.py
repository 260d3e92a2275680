"""docs/walk.md names functions that exist, in the order in which a run calls them."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import KDRL

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kdrl_lightning"

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

STOPS = re.findall(
    r"^\| \d+ \| `([\w/]+\.py):([\w.]+)` \| [^|]+\. \|$",
    (ROOT / "docs" / "walk.md").read_text(),
    re.M,
)


def names(file: str) -> set[str]:
    """Functions of a file, and methods as ``Class.method``."""
    out = set()
    for node in ast.parse((PACKAGE / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            out.add(node.name)
        elif isinstance(node, ast.ClassDef):
            out |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return out


def test_the_walk_has_at_most_ten_stops() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "walk.md").read_text(), re.M)
    assert [int(row) for row in rows] == list(range(1, len(STOPS) + 1))
    assert 5 <= len(STOPS) <= 10


@pytest.mark.parametrize(("file", "function"), STOPS)
def test_a_stop_exists(file: str, function: str) -> None:
    assert function in names(file)


def test_the_stops_are_called_in_their_order(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    stops = {(str(PACKAGE / file), function): i for i, (file, function) in enumerate(STOPS)}
    order: list[int] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        stop = stops.get((code.co_filename, code.co_qualname))
        if event == "call" and stop is not None and stop not in order:
            order.append(stop)

    # Reward shaping reads the student's scores, so that no stop is skipped.
    module = make_module(student_folder, teacher_folder, KDRL(0.5, form="reward_shaping"))
    sys.setprofile(note)
    try:
        fit(tmp_path, module, make_data(minibatches_per_rollout=1), max_steps=1)
    finally:
        sys.setprofile(None)
    assert order == list(range(len(STOPS)))
