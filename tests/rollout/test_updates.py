"""How a rollout becomes optimizer steps, with scores that show which pass computed them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import pytest
import torch

from helpers.one_rank import alone
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rollout.updates import (
    Cut,
    RolloutPlan,
    Waits,
    plan_updates,
    resume_updates,
    step_totals,
)
from kdrl_lightning.rollout_batch import RolloutBatch, StepTotals, collate

GROUPS, SIZE = 6, 3
NONE = Waits()


def rollout(cut: frozenset[int] = frozenset()) -> RolloutBatch:
    """Six groups of three; every token of the rollout is another number."""
    lengths = torch.randint(1, 9, (GROUPS * SIZE,), generator=torch.Generator().manual_seed(0))
    start, completions = 100, []
    for length in lengths.tolist():
        completions.append(list(range(start, start + length)))
        start += length
    return collate(
        [[5] * (1 + i // SIZE) for i in range(GROUPS * SIZE)],
        completions,
        [i // SIZE for i in range(GROUPS * SIZE)],
        pad_id=0,
        truncated=[i in cut for i in range(GROUPS * SIZE)],
        mask_truncated=True,
    )


def fake_score(part: RolloutBatch) -> RolloutBatch:
    """Scores that are functions of the token alone."""
    ids, mask = part.completion_ids.double(), part.completion_mask
    return part.replace(old_logprobs=-ids * mask, old_entropy=2 * ids * mask)


def fake_frozen(part: RolloutBatch) -> RolloutBatch:
    """The same of a teacher, which reads the student's best tokens where they are there."""
    ids, mask = part.completion_ids.double(), part.completion_mask
    return part.replace(teacher_logprobs=-3 * ids * mask)


def imitate_even_tokens(batch: RolloutBatch) -> RolloutBatch:
    return batch.replace(imitation_mask=batch.completion_mask & (batch.completion_ids % 2 == 0))


def unscored(part: RolloutBatch) -> RolloutBatch:
    return part


@dataclass
class Scorers:
    """As much of a module as a plan asks."""

    score: Any = fake_score
    score_teacher: Any = fake_frozen
    score_reference: Any = unscored
    prepare: Any = imitate_even_tokens
    reduce: Any = alone


def plan(
    batch: RolloutBatch | None = None, make: Any = plan_updates, waits: Waits = NONE, **changes: Any
) -> RolloutPlan:
    cut = {"minibatches": 3, "epochs": 2, "micro_batches": 2, "max_tokens": 8}
    own = {f.name for f in fields(Scorers)}
    scorers = Scorers(**{n: v for n, v in changes.items() if n in own})
    cut |= {n: v for n, v in changes.items() if n not in own}
    return make(batch or rollout(), 4, Cut(**cut), scorers, waits)


def rows_of(update: list[list[int]]) -> list[int]:
    return sorted(row for micro in update for row in micro)


@pytest.mark.parametrize("minibatches", [1, 2, 3, 6])
def test_minibatches_are_disjoint_and_hold_every_row(minibatches):
    updates = plan(minibatches=minibatches, epochs=1).updates
    assert len(updates) == minibatches
    assert sorted(row for update in updates for row in rows_of(update)) == list(range(18))


def test_a_micro_batch_holds_no_more_tokens_than_allowed():
    batch = collate([[5]] * 6, [[1], *[[1] * 8] * 5], [0] * 6, pad_id=0)
    free, bounded = (
        plan(batch, minibatches=1, epochs=1, max_micro_tokens=limit).updates[0]
        for limit in (float("inf"), 27.0)
    )
    assert [len(rows) for rows in free] == [1, 5]
    assert [len(rows) for rows in bounded] == [3, 3]


@pytest.mark.parametrize("minibatches", [1, 2, 3, 4, 6])
def test_minibatches_are_whole_groups_in_order(minibatches):
    made = plan(minibatches=minibatches, epochs=1)
    groups = [
        sorted(set(made.batch.group_ids[rows_of(update)].tolist())) for update in made.updates
    ]
    assert list(chain.from_iterable(groups)) == list(range(GROUPS))
    assert [len(rows_of(update)) for update in made.updates] == [SIZE * len(g) for g in groups]


def test_minibatches_have_as_many_groups_each_where_that_is_possible():
    made = plan(minibatches=3, epochs=1)
    assert [len(rows_of(update)) for update in made.updates] == [6, 6, 6]


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_epochs_replay_the_same_minibatches(epochs):
    once, made = plan(epochs=1), plan(epochs=epochs)
    assert made.updates == once.updates * epochs
    assert made.totals == once.totals * epochs


@pytest.mark.parametrize("micro_batches", [1, 2, 5, 6])
def test_each_update_has_the_asked_number_of_micro_batches(micro_batches):
    updates = plan(micro_batches=micro_batches).updates
    assert {len(update) for update in updates} == {micro_batches}
    assert all(micro for update in updates for micro in update)


def test_more_micro_batches_than_completions_are_refused():
    with pytest.raises(ConfigurationError, match=r"`accumulate_grad_batches` must be at most .* 6"):
        plan(micro_batches=7)


def test_groups_need_not_stand_together():
    batch = rollout().select([i % GROUPS * SIZE + i // GROUPS for i in range(GROUPS * SIZE)])
    made = plan(batch, epochs=1)
    groups = [set(batch.group_ids[rows_of(update)].tolist()) for update in made.updates]
    assert groups == [{0, 1}, {2, 3}, {4, 5}]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_scores_land_on_their_own_tokens(micro_batches):
    made = plan(micro_batches=micro_batches).batch
    ids, mask = made.completion_ids.double(), made.completion_mask
    assert torch.equal(made.old_logprobs, -ids * mask)
    assert torch.equal(made.old_entropy, 2 * ids * mask)
    assert torch.equal(made.teacher_logprobs, -3 * ids * mask)


def test_scores_are_0_behind_the_end():
    made = plan().batch
    behind = ~made.completion_mask
    for values in (made.old_logprobs, made.old_entropy, made.teacher_logprobs):
        assert not values[behind].any()


def test_scores_keep_their_type():
    assert plan().batch.old_logprobs.dtype == torch.float64


def test_a_score_that_is_not_made_stays_missing():
    made = plan(
        score=lambda part: part.replace(old_logprobs=part.completion_ids * -1.0),
        score_teacher=unscored,
    ).batch
    assert made.old_logprobs is not None
    assert made.teacher_logprobs is None and made.old_entropy is None


def frozen_parts(batch: RolloutBatch | None = None, **changes: Any) -> list[RolloutBatch]:
    """What teacher and reference are given."""
    seen: list[RolloutBatch] = []

    def score(part: RolloutBatch) -> RolloutBatch:
        seen.append(part)
        return fake_frozen(part)

    ids = plan(batch, score_teacher=score, **changes).batch
    assert torch.equal(ids.teacher_logprobs, -3.0 * ids.completion_ids * ids.completion_mask)
    return seen


def one_prompt_each(prompt: int, lengths: list[int]) -> RolloutBatch:
    """Two groups of equal prompts with completions of the given lengths, in turn."""
    return collate(
        [[5 + i % 2] * prompt for i in range(len(lengths))],
        [[1] * n for n in lengths],
        [i % 2 for i in range(len(lengths))],
        pad_id=0,
    )


def test_frozen_models_score_the_very_micro_batches_unless_told_otherwise():
    assert len(frozen_parts(minibatches=3, epochs=2, micro_batches=2)) == 6


@pytest.mark.parametrize(
    ("limit", "rows"),
    # Each micro-batch: 2 prompts of 10, 2 completions of 4. Joined, the prompts count once.
    [(0, [2] * 4), (28, [2] * 4), (36, [4, 4]), (44, [6, 2]), (51, [6, 2]), (52, [8])],
)
def test_frozen_models_take_several_micro_batches_up_to_their_tokens(limit, rows):
    batch = one_prompt_each(10, [4] * 8)
    seen = frozen_parts(batch, minibatches=1, epochs=1, micro_batches=4, frozen_tokens=limit)
    assert [len(part) for part in seen] == rows


def test_frozen_models_do_not_take_parts_together_that_padding_would_make_more_work():
    # 2 x 3 + 4 x 1 tokens and 2 x 3 + 4 x 9; joined 2 x 3 + 8 x 9, and the prompts save but 6.
    batch = one_prompt_each(3, [1, 1, 1, 1, 9, 9, 9, 9])
    seen = frozen_parts(batch, minibatches=1, epochs=1, micro_batches=2, frozen_tokens=4096)
    assert [len(part) for part in seen] == [4, 4]
    batch = one_prompt_each(30, [1, 1, 1, 1, 9, 9, 9, 9])
    seen = frozen_parts(batch, minibatches=1, epochs=1, micro_batches=2, frozen_tokens=4096)
    assert [len(part) for part in seen] == [8]


def test_frozen_models_repeat_a_prompt_for_so_many_rows_alone():
    # A prompt of 100 once and 8 completions of 4: 132 tokens, but 832 with the prompt in each row.
    batch = collate([[5] * 100] * 8, [[1] * 4] * 8, [0] * 8, pad_id=0)
    rows = [
        [len(p) for p in frozen_parts(batch, minibatches=1, micro_batches=8, frozen_tokens=limit)]
        for limit in (132, 156, 208)
    ]
    assert rows == [[5, 3], [6, 2], [8]]


def test_frozen_models_take_parts_of_several_updates_together():
    batch = collate(
        [[5 + i // 2] * 10 for i in range(8)], [[1] * 4] * 8, [0, 0, 1, 1, 2, 2, 3, 3], pad_id=0
    )
    seen = frozen_parts(batch, minibatches=4, epochs=2, micro_batches=2, frozen_tokens=4096)
    assert [part.group_ids.tolist() for part in seen] == [[0, 0, 1, 1, 2, 2, 3, 3]]


@pytest.mark.parametrize("limit", [0, 4096])
def test_frozen_models_see_what_the_student_said_of_the_same_rows(limit):
    for part in frozen_parts(micro_batches=3, frozen_tokens=limit):
        assert torch.equal(part.old_logprobs, -1.0 * part.completion_ids * part.completion_mask)


@pytest.mark.parametrize("student", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
def test_the_first_update_waits_for_the_student_and_each_for_its_teacher(student, teacher):
    seen: list[str] = []

    def score(part: RolloutBatch) -> RolloutBatch:
        seen.append("student")
        return fake_score(part)

    def score_teacher(part: RolloutBatch) -> RolloutBatch:
        seen.append("teacher")
        return fake_frozen(part)

    def prepare(batch: RolloutBatch) -> RolloutBatch:
        assert (batch.old_logprobs is None, batch.teacher_logprobs is None) == (student, teacher)
        return batch

    made = plan(
        epochs=1,
        waits=Waits(student, teacher),
        score=score,
        score_teacher=score_teacher,
        prepare=prepare,
    )
    assert seen == ["student"] * (4 if student else 6) + ["teacher"] * (0 if teacher else 6)
    for update in range(3):
        micro = made.micro_batch(update, 0)
        waits = student and not update
        assert (micro.old_logprobs is None, micro.old_entropy is None) == (waits, waits)
        assert (micro.teacher_logprobs is None) == teacher
        ids = micro.completion_ids * micro.completion_mask
        assert waits or torch.equal(micro.old_logprobs, -1.0 * ids)
        assert teacher or torch.equal(micro.teacher_logprobs, -3.0 * ids)


def test_with_one_update_nothing_is_stored_of_the_student():
    made = plan(minibatches=1, epochs=1, waits=Waits(student=True))
    assert made.batch.old_logprobs is None and made.micro_batch(0, 1).old_logprobs is None


@pytest.mark.parametrize("had", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
def test_a_resumed_rollout_is_scored_only_by_a_teacher_that_it_left_to_its_updates(had, teacher):
    def never(part: RolloutBatch) -> RolloutBatch:
        raise AssertionError

    before = plan(epochs=1, waits=Waits(student=True, teacher=not had))
    others = {"score": never, "score_reference": never, "prepare": never}
    asked = fake_frozen if not had and not teacher else never
    after = plan(
        before.batch,
        resume_updates,
        Waits(teacher=teacher),
        epochs=1,
        score_teacher=asked,
        **others,
    )
    assert (after.updates, after.totals) == (before.updates, before.totals)
    for update in (1, 2):
        micro = after.micro_batch(update, 0)
        ids = micro.completion_ids * micro.completion_mask
        assert torch.equal(micro.old_logprobs, -1.0 * ids)
        assert (micro.teacher_logprobs is None) == (teacher and not had)
        if micro.teacher_logprobs is not None:
            assert torch.equal(micro.teacher_logprobs, -3.0 * ids)


def test_scoring_sees_the_very_micro_batches_of_the_updates():
    seen: list[RolloutBatch] = []

    def score(part: RolloutBatch) -> RolloutBatch:
        seen.append(part)
        return fake_score(part)

    made = plan(score=score, minibatches=3, epochs=2, micro_batches=2)
    assert len(seen) == 6
    for i, part in enumerate(seen):
        micro = made.micro_batch(i // 2, i % 2)
        assert torch.equal(part.input_ids, micro.input_ids)
        assert torch.equal(part.completion_mask, micro.completion_mask)


def test_prepare_sees_the_whole_scored_rollout_once():
    seen: list[RolloutBatch] = []

    def prepare(batch: RolloutBatch) -> RolloutBatch:
        seen.append(batch)
        return imitate_even_tokens(batch)

    made = plan(prepare=prepare)
    assert len(seen) == 1
    assert len(seen[0]) == 18
    assert torch.equal(seen[0].old_logprobs, made.batch.old_logprobs)


def test_totals_count_each_step():
    cut = frozenset({2, 9, 10, 11})
    batch = rollout(cut)
    made = plan(batch, epochs=1)
    assert len(made.totals) == 3
    for i, totals in enumerate(made.totals):
        rows = [row for row in range(6 * i, 6 * i + 6) if row not in cut]
        tokens = [t for r in rows for t in batch.completion_ids[r].tolist() if t]
        assert totals == StepTotals(
            num_loss_tokens=len(tokens),
            num_imitated_tokens=sum(t % 2 == 0 for t in tokens),
            num_completions=len(rows),
            num_prompts=len({r // SIZE for r in rows}),
            max_tokens=8,
        )
    assert made.totals[1].num_prompts == 1


def test_totals_are_over_all_ranks():
    mine, both = plan().totals, plan(reduce=lambda t, operation: t + 10).totals
    for own, total in zip(mine, both, strict=True):
        assert total.num_loss_tokens == own.num_loss_tokens + 10
        assert total.num_imitated_tokens == own.num_imitated_tokens + 10
        assert total.num_completions == own.num_completions + 10
        assert total.num_prompts == own.num_prompts + 10
        assert total.max_tokens == own.max_tokens


def test_step_totals_of_one_rank_are_its_count():
    batch = imitate_even_tokens(rollout())
    assert step_totals(batch, 8, alone) == batch.count(8)


def test_tokens_of_micro_batches_add_up_to_the_step():
    made = plan()
    for update, totals in enumerate(made.totals):
        parts = [made.micro_batch(update, micro).count(8) for micro in range(2)]
        assert sum(p.num_loss_tokens for p in parts) == totals.num_loss_tokens
        assert sum(p.num_imitated_tokens for p in parts) == totals.num_imitated_tokens
        assert sum(p.num_completions for p in parts) == totals.num_completions


def test_a_micro_batch_is_trimmed_and_carries_its_steps_totals():
    made = plan()
    for update in range(6):
        for micro in range(2):
            part = made.micro_batch(update, micro)
            assert part.totals == made.totals[update]
            assert part.input_ids.shape[1] == int(part.lengths.max())
            assert part.completion_ids.shape[1] == int(part.completion_lengths.max())


def test_metrics_go_out_with_the_first_micro_batch_alone():
    made = plan().with_metrics({"reward/mean": 0.5})
    out = [made.micro_batch(u, m).metrics for u in range(6) for m in range(2)]
    assert out == [{"reward/mean": 0.5}] + [{}] * 11


def test_metrics_change_nothing_else():
    made = plan()
    other = made.with_metrics({"a": 1.0})
    assert made.metrics == {}
    assert (other.rollout, other.updates, other.totals) == (4, made.updates, made.totals)
    assert other.batch is made.batch
