"""Rows that cannot be used are replaced alike on any number of ranks, counted, and named."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from helpers.short_runs import make_slots
from kdrl_lightning.common.distributed import require_embedded
from kdrl_lightning.engines.base import Sampling
from kdrl_lightning.errors import BadRow, TrainingStopped
from kdrl_lightning.rollout.draws import LAST_ROLLOUTS, DrawCounts, draw
from kdrl_lightning.rollout.groups import Collector, GroupShare
from kdrl_lightning.rollout.loader import rows_at
from kdrl_lightning.rollout_batch import STUDENT, TEACHER


class Some(Sequence[Any]):
    """Prompts, some of which are bad."""

    def __init__(self, size: int, bad: set[int], wished: bool = False) -> None:
        self.size, self.bad, self.wished = size, bad, wished

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if index in self.bad:
            raise BadRow(f"row {index} of `some`: bad.", self.wished)
        return {"row": index}, [index]


def collector(count: int, refills: int = 0, seed: int = 3) -> Collector:
    engine: Any = None
    sampling = Sampling(4, 1.0)
    return Collector(
        make_slots(count, 1, refills, seed),
        GroupShare(STUDENT, engine, 2, sampling),
        GroupShare(TEACHER, engine, 0, sampling),
    )


def drawn(own: Collector, prompts: Any, rollout: int, slots: Sequence[int]) -> list[int]:
    chosen, _ = own._prompts(rollout, prompts, list(slots))
    return [row["row"] for row, _ in chosen]


def test_without_bad_rows_the_order_is_that_of_the_stream() -> None:
    own, prompts = collector(4), Some(10, set())
    found = [row for rollout in range(9) for row in drawn(own, prompts, rollout, range(4))]
    assert found == rows_at(range(36), 10, 3)


def test_a_bad_row_is_replaced_by_that_of_the_slots_next_rollout() -> None:
    own = collector(4)
    plain = [drawn(own, Some(1000, set()), rollout, range(4)) for rollout in range(4)]
    bad = {plain[0][1], plain[1][1], plain[2][3]}
    found = [drawn(own, Some(1000, bad), rollout, range(4)) for rollout in range(4)]
    assert found[0] == [plain[0][0], plain[2][1], *plain[0][2:]]
    assert found[1] == [plain[1][0], plain[2][1], *plain[1][2:]]
    assert found[2] == [*plain[2][:3], plain[3][3]]
    assert found[3] == plain[3]
    # A rank needs to know nothing of the slots of another.
    assert drawn(own, Some(1000, bad), 0, [1, 3]) == [found[0][1], found[0][3]]


def test_the_same_prompts_come_again_if_they_are_to_be_overfit() -> None:
    own, prompts = collector(4), Some(1000, {rows_at([1], 1000, 3)[0]})
    own.repeat = 2
    found = [drawn(own, prompts, rollout, range(4)) for rollout in range(6)]
    assert found == [found[0], found[1]] * 3
    assert found[0] != found[1]


def test_a_source_of_bad_rows_stops_the_run() -> None:
    words = r"^100 prompts in a row cannot be used\..* The last error: row \d+ of `some`: bad\.$"
    with pytest.raises(TrainingStopped, match=words):
        drawn(collector(2), Some(1000, set(range(1000))), 0, [0])
    assert draw(Some(9, {1, 2}), [1, 2, 3])[0] == ({"row": 3}, [3])


def bad(*rows: int, wished: bool = False) -> list[BadRow]:
    return [BadRow(f"row {row} of `some`: bad.", wished) for row in rows]


def test_the_first_bad_rows_are_named() -> None:
    counts = DrawCounts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts.add(4, bad(1, 2, 3))
        counts.add(4, bad(4, 5, 6))
        counts.add(4, bad(7, wished=True))
    lines = [str(warning.message) for warning in caught]
    assert lines == [f"skipped row {i} of `some`: bad." for i in range(1, 5)] + [
        "skipped row 5 of `some`: bad. Further rows are only counted."
    ]
    assert counts.take() == [12 + 7, 7, 6]
    assert counts.take() == [0, 0, 0]


def test_one_bad_row_never_stops_a_run_and_a_tenth_does_not() -> None:
    counts = DrawCounts()
    counts.judge(2, 1)
    counts = DrawCounts()
    counts.judge(30, 3)


@pytest.mark.filterwarnings("ignore:skipped row")
def test_more_than_a_tenth_of_the_last_rollouts_does() -> None:
    counts = DrawCounts()
    counts.add(8, bad(5))
    counts.judge(9, 1)
    words = (
        r"^3 of the 19 prompts drawn in the last 2 rollouts cannot be used, above 10%\. Correct "
        r"these rows\. The last error on this rank: row 5 of `some`: bad\.$"
    )
    with pytest.raises(TrainingStopped, match=words):
        counts.judge(10, 2)


def test_old_rollouts_are_forgotten() -> None:
    counts = DrawCounts()
    for _ in range(3):
        counts.judge(100, 10)
        for _ in range(LAST_ROLLOUTS):
            counts.judge(10, 0)
    with pytest.raises(TrainingStopped, match=r"^11 of the 100 prompts"):
        counts.judge(10, 11)


def test_a_resumed_run_decides_as_the_whole_one() -> None:
    counts, again = DrawCounts(), DrawCounts()
    counts.judge(20, 2)
    again.load_state_dict(counts.state_dict())
    for own in (counts, again):
        with pytest.raises(TrainingStopped, match=r"^4 of the 30 prompts drawn in"):
            own.judge(10, 2)


def test_a_teachers_token_that_the_student_does_not_have_is_refused() -> None:
    words = (
        r"^token ids of the teacher's completions must be below 16, the rows of the student's "
        r"embedding: got 16\. Choose a teacher"
    )
    with pytest.raises(TrainingStopped, match=words):
        require_embedded(torch.tensor([[3, 16], [1, 0]]), 16)
    require_embedded(torch.tensor([[3, 15]]), 16)
