"""A rollout in a checkpoint: any number of processes restores the rows it would have sampled."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.short_runs import make_slots
from kdrl_lightning.rollout import saved as store
from kdrl_lightning.rollout.prompt_order import Slots
from kdrl_lightning.rollout.updates import TEACHER_FIELDS
from kdrl_lightning.rollout_batch import RolloutBatch, collate, pad_rows

PAD = 7
WIDE = ("old_logprobs", "old_entropy", "teacher_logprobs", "teacher_entropy", "ref_logprobs")


@st.composite
def rollouts(draw: Any) -> tuple[Slots, list[list[tuple[list[int], list[int]]]], int]:
    """Slots, with (prompt, completion) pairs for each; shares of processes may be uneven."""
    slots = make_slots(12 * draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3])), 0, 0)
    tokens = st.lists(st.integers(0, 30), max_size=5)
    prompt = st.lists(st.integers(0, 30), min_size=1, max_size=4)
    size = draw(st.integers(1, 3))
    groups = []
    for _ in range(slots.count):
        text = draw(prompt)
        groups.append([(text, draw(tokens)) for _ in range(size)])
    return slots, groups, draw(st.integers(0, 10**6))


def batch_of(slots: list[int], groups: Any, seed: int, dtype: torch.dtype) -> RolloutBatch:
    """The batch that a rank with these slots makes: values depend on the slot alone."""
    rows = [(g, s, i) for g, s in enumerate(slots) for i in range(len(groups[s]))]
    pairs = [groups[s][i] for _, s, i in rows]

    def noise(key: int, s: int, i: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, key, s, i)) % 2**31)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = collate(
        [p for p, _ in pairs],
        [c for _, c in pairs],
        [g for g, _, _ in rows],
        pad_id=PAD,
        rewards=[float(noise(0, s, i, 1)) for _, s, i in rows],
        correct=[(s + i) % 2 == 0 for _, s, i in rows],
        truncated=[(s + i) % 3 == 0 for _, s, i in rows],
        policy_version=[seed] * len(rows),
        rollout_logprobs=[noise(1, s, i, len(groups[s][i][1])).tolist() for _, s, i in rows],
        source=[i % 2 for _, _, i in rows],
        teacher_route=[s % 3 for _, s, _ in rows],
        mask_truncated=seed % 2 == 0,
    ).replace(temperature=0.7)
    width = batch.completion_ids.shape[1]
    scored: dict[str, Tensor] = {
        n: torch.zeros(len(rows), width, dtype=dtype) for n in WIDE
    }  # fmt: skip
    scored["topk_ids"] = torch.zeros(len(rows), width, 3, dtype=torch.long)
    scored["teacher_topk_logprobs"] = torch.zeros(len(rows), width, 3, dtype=dtype)
    for row, (_, s, i) in enumerate(rows):
        length = len(groups[s][i][1])
        for key, value in enumerate(scored.values()):
            own = noise(key + 2, s, i, length, *value.shape[2:])
            value[row, :length] = (own * 100).to(value.dtype)
    scored["advantages"] = torch.stack([noise(99, s, i, 1)[0] for _, s, i in rows])
    if seed % 2:
        scored["has_context"] = torch.tensor([(s + i) % 2 == 0 for _, s, i in rows])
        prompts = [[s, *p][: 1 + i] for (_, s, i), (p, _) in zip(rows, pairs, strict=True)]
        scored["teacher_prompt_ids"] = pad_rows(prompts, -1, torch.long)
    scored["imitation_mask"] = batch.completion_mask & (scored["ref_logprobs"] > 0)
    if seed % 3 == 0:  # each update runs the teacher, and the first one the student
        scored = {n: v for n, v in scored.items() if not n.startswith(("teacher", "old", "topk"))}
    return batch.replace(**scored)


def packed(parts: list[tuple[RolloutBatch, list[int]]], patch: Any) -> Any:
    """Pack as several ranks would: each hands in its part, the first gets all."""
    given_in: list[Any] = []
    patch.setattr(store, "_gather", lambda own: given_in.append(own))
    for batch, slots in parts[::-1]:
        assert store.pack(batch, slots, PAD) is None
    patch.setattr(store, "_gather", lambda own: given_in[::-1])
    return store.pack(*parts[0], PAD)


def same(ours: RolloutBatch, theirs: RolloutBatch) -> None:
    for item in fields(ours):
        a, b = getattr(ours, item.name), getattr(theirs, item.name)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype and a.device == b.device, item.name
            assert a.shape == b.shape and torch.equal(a, b), item.name
        else:
            assert a == b, item.name


@settings(deadline=None, max_examples=60)
@given(rollouts(), st.integers(1, 4), st.integers(1, 4), st.sampled_from([32, 64]))
def test_any_number_of_processes_finds_its_rows(
    drawn: Any, before: int, after: int, bits: int
) -> None:
    slots, groups, seed = drawn
    dtype = {32: torch.float32, 64: torch.float64}[bits]
    parts = []
    for rank in range(before):
        own = slots.of_rank(rank, before)
        parts.append((batch_of(own, groups, seed, dtype), own))
    with pytest.MonkeyPatch.context() as patch:
        state = packed(parts, patch)
    assert state["temperature"] == 0.7
    assert {type(v) for v in state.values()} <= {Tensor, float, bool}  # read as plain values
    assert state["group_ids"].tolist() == sorted(state["group_ids"].tolist())
    taken = []
    for rank in range(after):
        own = slots.of_rank(rank, after)
        taken += own
        got = store.unpack(state, own)
        same(got, batch_of(own, groups, seed, dtype))
        if after == before:
            same(got, parts[rank][0])
    assert sorted(taken) == list(range(slots.count))


def test_the_teachers_prompts_of_processes_end_where_they_did() -> None:
    parts = []
    for slot, prompt in enumerate(([5], [5, 6, 7])):
        batch = collate([[1]], [[2]], [0], pad_id=PAD)
        parts.append((batch.replace(teacher_prompt_ids=torch.tensor([prompt])), [slot]))
    with pytest.MonkeyPatch.context() as patch:
        state = packed(parts, patch)
    assert state["teacher_prompt_ids"].tolist() == [[5, -1, -1], [5, 6, 7]]


def test_one_process_needs_no_other() -> None:
    slots = make_slots(4, 2, 0, 0)
    groups = [[([1, 2], [3] * n), ([1, 2], [4])] for n in range(4)]
    own = slots.of_rank(0, 1)
    batch = batch_of(own, groups, 3, torch.float32)
    state = store.pack(batch, own, PAD)
    assert state is not None
    same(store.unpack(state, own), batch)
    # The state is plain, so that it is read without running anything.
    assert all(value.device.type == "cpu" for value in state.values() if torch.is_tensor(value))


@pytest.mark.parametrize("pending", [True, False])
def test_a_rollout_of_0_1_says_that_its_teacher_is_yet_to_come(pending: bool) -> None:
    slots = make_slots(2, 1, 0, 0)
    batch = batch_of([0, 1], [[([1], [2, 3])], [([1], [4])]], 1, torch.float32)
    assert batch.teacher_logprobs is not None
    state = store.pack(batch, slots.of_rank(0, 1), PAD)
    assert state is not None
    got = store.unpack({**state, "teacher_pending": pending}, slots.of_rank(0, 1))
    names = [f.name for f in fields(got) if f.name in TEACHER_FIELDS]
    assert len(names) == len(TEACHER_FIELDS) == 7
    missing = batch.replace(**dict.fromkeys(names))
    same(got, missing if pending else batch)
