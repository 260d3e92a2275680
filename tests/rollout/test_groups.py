"""Slots of a rollout, their prompts and noise, and the refill of flat groups."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import reference  # noqa: F401  (the hypothesis profile)
from helpers.short_runs import make_slots
from kdrl_lightning.engines.base import Completion, RolloutEngine, Sampling, noise_seed
from kdrl_lightning.rewards import Verdict
from kdrl_lightning.rollout.generation import Judged
from kdrl_lightning.rollout.groups import Collector, GroupShare
from kdrl_lightning.rollout.loader import rows_at
from kdrl_lightning.rollout.prompt_order import (
    EVALUATION_NOISE,
    TEACHER_NOISE,
    TRAIN_NOISE,
)
from kdrl_lightning.rollout.refills import fill_groups
from kdrl_lightning.rollout_batch import STUDENT, TEACHER


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_ranks_share_all_slots_and_every_mini_batch(
    minibatches: int, world_size: int, each: int
) -> None:
    share = world_size * each
    slots = make_slots(minibatches * share, minibatches, 0, seed=0)
    of_ranks = [slots.of_rank(rank, world_size) for rank in range(world_size)]
    assert sorted(s for own in of_ranks for s in own) == list(range(slots.count))
    for own in of_ranks:
        # In the order of the mini-batches, and as many of each.
        assert [s // share for s in own] == [m for m in range(minibatches) for _ in range(each)]


def test_slots_of_two_ranks_by_hand() -> None:
    slots = make_slots(8, 2, 0, seed=0)
    assert slots.of_rank(0, 2) == [0, 2, 4, 6]
    assert slots.of_rank(1, 2) == [1, 3, 5, 7]
    assert slots.of_rank(0, 1) == list(range(8))


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 5))
def test_no_position_comes_twice(count: int, max_refills: int, rollouts: int) -> None:
    slots = make_slots(count, 1, max_refills, seed=0)
    positions = [
        slots.position(rollout, slot, attempt)
        for rollout in range(rollouts)
        for attempt in range(max_refills + 1)
        for slot in range(count)
    ]
    assert positions == list(range(rollouts * (max_refills + 1) * count))


def test_without_refills_positions_run_through_the_prompts() -> None:
    slots = make_slots(4, 2, 0, seed=3)
    for rollout in range(5):
        for slot in range(4):
            assert slots.position(rollout, slot, 0) == rollout * 4 + slot
            assert slots.seeds(rollout, slot, 0, TRAIN_NOISE, 2) == [
                noise_seed(3, TRAIN_NOISE, rollout, slot, k) for k in range(2)
            ]


def test_noise_of_the_first_attempt_does_not_depend_on_refills() -> None:
    few, many = make_slots(4, 1, 0, seed=1), make_slots(4, 1, 5, seed=1)
    for slot in range(4):
        assert few.seeds(7, slot, 0, TRAIN_NOISE, 3) == many.seeds(7, slot, 0, TRAIN_NOISE, 3)


def test_no_noise_comes_twice() -> None:
    slots = make_slots(3, 1, 2, seed=0)
    seeds = [
        seed
        for stream in (TRAIN_NOISE, EVALUATION_NOISE, TEACHER_NOISE)
        for rollout in range(3)
        for attempt in range(3)
        for slot in range(3)
        for seed in slots.seeds(rollout, slot, attempt, stream, 4)
    ]
    assert len(set(seeds)) == len(seeds) == 3 * 3 * 3 * 3 * 4


def test_a_longer_group_begins_like_a_shorter_one() -> None:
    slots = make_slots(3, 1, 0, seed=0)
    assert slots.seeds(1, 2, 0, 0, 6)[:4] == slots.seeds(1, 2, 0, 0, 4)


def group(*rewards: float) -> list[Judged]:
    return [Judged([1], {}, Completion([1], [0.0], False), "", Verdict(r, False)) for r in rewards]


class Sampler:
    """Answers each slot with the rewards written down for its attempts."""

    def __init__(self, rewards: dict[int, list[tuple[float, ...]]]) -> None:
        self.rewards = rewards
        self.asked: list[list[int]] = []

    def __call__(self, slots: list[int], attempt: int) -> list[list[Judged]]:
        self.asked.append(slots)
        assert attempt == len(self.asked) - 1
        return [group(*self.rewards[s][attempt]) for s in slots]


def rewards_of(groups: list[list[Judged]]) -> list[list[float]]:
    return [[j.verdict.reward for j in g] for g in groups]


def test_flat_groups_are_replaced_in_their_place() -> None:
    sampler = Sampler({5: [(1, 1), (0, 1)], 2: [(0, 1)], 9: [(0, 0), (2, 2), (3, 0)], 4: [(1, 0)]})
    groups, replaced = fill_groups([5, 2, 9, 4], sampler, max_refills=3)
    assert rewards_of(groups) == [[0, 1], [0, 1], [3, 0], [1, 0]]
    assert sampler.asked == [[5, 2, 9, 4], [5, 9], [9]]
    assert rewards_of(replaced) == [[1, 1], [0, 0], [2, 2]]


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_what_is_still_flat_at_the_limit_stays(limit: int) -> None:
    sampler = Sampler({0: [(1, 1), (2, 2), (3, 3), (4, 4)], 1: [(0, 1)]})
    groups, replaced = fill_groups([0, 1], sampler, limit)
    assert rewards_of(groups) == [[limit + 1, limit + 1], [0, 1]]
    assert len(sampler.asked) == limit + 1
    assert rewards_of(replaced) == [[k, k] for k in range(1, limit + 1)]


def test_no_slots_sample_nothing_twice() -> None:
    sampler = Sampler({})
    assert fill_groups([], sampler, 3) == ([], [])
    assert sampler.asked == [[]]


def test_another_problem_is_the_same_on_any_number_of_ranks() -> None:
    slots = make_slots(8, 2, 1, seed=3)
    engine = cast(RolloutEngine, None)  # nothing is sampled
    share = GroupShare(0, engine, 4, Sampling(8))
    collector = Collector(slots, share, share)
    prompts = [({"prompt": str(i)}, [i]) for i in range(40)]

    def others(rank: int, world: int) -> dict[int, str]:
        rows = collector.others(1, prompts, rank, world)
        own = zip(slots.of_rank(rank, world), rows, strict=True)
        return {slot: row["prompt"] for slot, row in own}

    whole = others(0, 1)
    assert others(0, 2) | others(1, 2) == whole and len(set(whole.values())) == 8
    # None of them is a prompt of this rollout, of a refill either.
    here = [slots.position(1, slot, attempt) for slot in range(8) for attempt in range(2)]
    assert not {str(row) for row in rows_at(here, 40, 3)} & set(whole.values())


def asked_of_the_teacher(only_failed: bool, solved: set[int]) -> tuple[list[int], list[int], Any]:
    """Prompts that the teacher answers, those asked for in advance, and the batch."""
    engine: Any = SimpleNamespace(supports_async=True, version=0, exact=True)
    share = [GroupShare(source, engine, 2, Sampling(4, 1.0)) for source in (STUDENT, TEACHER)]
    collector = Collector(make_slots(4, 2, 0, seed=0), *share, only_failed=only_failed)
    prompts = [({"prompt": str(i)}, [i]) for i in range(4)]
    asked: list[int] = []

    def sample(
        _: Any, some: Any, seeds: Sequence[list[int]], sampling: Any, source: int
    ) -> list[Judged]:
        if source == TEACHER:
            asked.extend(ids[0] for _, ids in some)
        return [
            Judged(
                ids,
                row,
                Completion([seed % 50], [0.0], False),
                "",
                Verdict(0.0, source == STUDENT and ids[0] in solved and k == 1),
                source,
            )
            for (row, ids), each in zip(some, seeds, strict=True)
            for k, seed in enumerate(each)
        ]

    batch, *_ = collector.collect(
        0, prompts, 0, 1, sample, lambda row: 0, lambda row, ids: [*ids, 9], pad_id=0
    )
    ahead = collector.ahead(0, prompts, 0, 1, lambda row, ids: [*ids, 9])
    return asked, [len(one.prompts[0]) for one in ahead], batch


def test_a_teacher_that_answers_failed_prompts_alone_is_asked_for_no_other() -> None:
    asked, ahead, batch = asked_of_the_teacher(True, solved={1, 2})
    assert sorted(asked) == [0, 3]
    assert ahead == [1]  # the student's prompts: whom the teacher answers is not known yet
    sizes = {int(row[0]): int((batch.input_ids[:, 0] == row[0]).sum()) for row in batch.input_ids}
    assert sizes == {0: 4, 1: 2, 2: 2, 3: 4}
    # The noise of a teacher's completion is the one that it has in a rollout with all of them.
    everyone = asked_of_the_teacher(False, solved={1, 2})
    assert sorted(everyone[0]) == [0, 1, 2, 3] and everyone[1] == [1, 2]
    for prompt in (0, 3):
        ids = [b.completion_ids[b.input_ids[:, 0] == prompt] for b in (batch, everyone[2])]
        assert ids[0].equal(ids[1])
