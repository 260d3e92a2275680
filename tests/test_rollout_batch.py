"""The rollout batch on token lists written by hand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from kdrl_lightning.rollout_batch import RolloutBatch, StepTotals, collate, pad_rows

PAD, EOS = 0, 1


@pytest.fixture
def batch() -> RolloutBatch:
    """Three completions of two prompts; the last one is cut."""
    return collate(
        prompts=[[5, 6, 7], [5, 6, 7], [8]],
        completions=[[9, EOS], [4, 4, EOS], [3, 3, 3, 3]],
        group_ids=[0, 0, 1],
        pad_id=PAD,
        rewards=[1.0, 0.0, 0.5],
        correct=[True, False, False],
        truncated=[False, False, True],
        policy_version=[7, 7, 8],
        rollout_logprobs=[[-0.1, -0.2], [-0.3, -0.4, -0.5], [-0.6, -0.7, -0.8, -0.9]],
    ).replace(temperature=0.7)


def test_collate_writes_prompt_completion_padding(batch):
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 9, EOS, PAD],
        [5, 6, 7, 4, 4, EOS],
        [8, 3, 3, 3, 3, PAD],
    ]
    assert batch.prompt_lengths.tolist() == [3, 3, 1]


def test_collate_writes_completions_at_column_0(batch):
    assert batch.completion_ids.tolist() == [
        [9, EOS, PAD, PAD],
        [4, 4, EOS, PAD],
        [3, 3, 3, 3],
    ]
    assert batch.completion_mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    torch.testing.assert_close(
        batch.rollout_logprobs,
        torch.tensor([[-0.1, -0.2, 0, 0], [-0.3, -0.4, -0.5, 0], [-0.6, -0.7, -0.8, -0.9]]),
    )


def test_collate_keeps_what_is_said_of_each_completion(batch):
    assert batch.group_ids.tolist() == [0, 0, 1]
    assert batch.rewards.tolist() == [1.0, 0.0, 0.5]
    assert batch.correct.tolist() == [True, False, False]
    assert batch.truncated.tolist() == [False, False, True]
    assert batch.policy_version.tolist() == [7, 7, 8]
    assert batch.temperature == 0.7


def test_types_are_those_of_the_docstring(batch):
    int64 = ("input_ids", "prompt_lengths", "completion_ids", "group_ids", "policy_version")
    boolean = ("completion_mask", "loss_mask", "correct", "truncated")
    assert {getattr(batch, name).dtype for name in int64} == {torch.int64}
    assert {getattr(batch, name).dtype for name in boolean} == {torch.bool}
    assert batch.rewards.dtype == batch.rollout_logprobs.dtype == torch.float32


def test_collate_defaults_are_blank():
    batch = collate([[5]], [[6, EOS]], [0], pad_id=PAD)
    assert batch.rewards.tolist() == [0.0]
    assert batch.correct.tolist() == batch.truncated.tolist() == [False]
    assert batch.policy_version.tolist() == [0]
    assert batch.temperature == 1.0
    assert batch.rollout_logprobs is batch.old_logprobs is batch.totals is None
    assert dict(batch.metrics) == {}


def test_lengths_count_real_tokens(batch):
    assert len(batch) == 3
    assert batch.completion_lengths.tolist() == [2, 3, 4]
    assert batch.lengths.tolist() == [5, 6, 5]


def test_a_pad_token_that_was_sampled_counts():
    batch = collate([[5]], [[PAD, EOS]], [0], pad_id=PAD)
    assert batch.completion_lengths.tolist() == [2]


def test_group_tokens_counts_the_whole_group(batch):
    assert batch.group_tokens.tolist() == [5.0, 5.0, 4.0]


def test_truncated_completions_stay_in_the_loss_unless_masked(batch):
    assert torch.equal(batch.loss_mask, batch.completion_mask)


def test_mask_truncated_leaves_a_cut_completion_out_of_the_loss_alone():
    batch = collate(
        [[5]] * 3,
        [[6, EOS], [7, 7, 7], [8, EOS]],
        [0, 0, 1],
        pad_id=PAD,
        truncated=[False, True, False],
        mask_truncated=True,
    )
    assert batch.completion_mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    assert batch.loss_mask.int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 0]]
    assert batch.group_tokens.tolist() == [2.0, 2.0, 2.0]
    assert batch.count(9) == StepTotals(4.0, 4.0, 2.0, 2.0, 9)


def test_a_group_that_is_masked_whole_is_no_prompt():
    batch = collate(
        [[5], [5]],
        [[6, EOS], [7]],
        [0, 1],
        pad_id=PAD,
        truncated=[False, True],
        mask_truncated=True,
    )
    assert batch.count(2) == StepTotals(2.0, 2.0, 1.0, 1.0, 2)


def test_collate_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="zip"):
        collate([[5], [5]], [[6]], [0], pad_id=PAD)


def test_an_empty_batch_has_no_rows():
    batch = collate([], [], [], pad_id=PAD)
    assert len(batch) == 0
    assert batch.count(4) == StepTotals(0.0, 0.0, 0.0, 0.0, 4)
    assert len(batch.select([])) == 0


def test_select_trims_to_the_longest_row_and_completion(batch):
    part = batch.select([0])
    assert part.input_ids.tolist() == [[5, 6, 7, 9, EOS]]
    assert part.completion_ids.tolist() == [[9, EOS]]
    assert part.completion_mask.shape == part.loss_mask.shape == part.rollout_logprobs.shape
    assert part.group_tokens.tolist() == [5.0]


def test_select_takes_rows_in_the_given_order(batch):
    part = batch.select([2, 0])
    assert part.rewards.tolist() == [0.5, 1.0]
    assert part.input_ids.tolist() == [[8, 3, 3, 3, 3], [5, 6, 7, 9, EOS]]
    assert part.completion_ids.tolist() == [[3, 3, 3, 3], [9, EOS, PAD, PAD]]


def test_select_takes_a_tensor_of_rows_too(batch):
    assert batch.select(torch.tensor([1])).rewards.tolist() == batch.select([1]).rewards.tolist()


def test_select_trims_every_token_field_and_no_sequence_field(batch):
    per_token = ("old_logprobs", "old_entropy", "teacher_logprobs", "advantages", "imitation_mask")
    full = batch.replace(**{name: torch.ones(3, 4) for name in per_token})
    part = full.select([0, 1])
    assert {getattr(part, name).shape for name in per_token} == {(2, 3)}
    assert full.replace(advantages=torch.ones(3)).select([0, 1]).advantages.shape == (2,)


def test_select_keeps_totals_and_metrics(batch):
    totals = StepTotals(1, 2, 3, 4, 5)
    part = batch.replace(totals=totals, metrics={"a": 1.0}).select([1])
    assert part.totals == totals
    assert part.metrics == {"a": 1.0}
    assert part.temperature == 0.7


def test_rows_without_context_are_not_taught(batch):
    assert batch.taught_mask is batch.loss_mask
    part = batch.replace(has_context=torch.tensor([True, False, True])).select([1, 2])
    assert part.has_context.tolist() == [False, True]
    assert part.taught_mask.int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(part.loss_mask, batch.loss_mask[[1, 2]])
    assert part.to("meta").has_context.device.type == "meta"


def test_select_trims_the_teachers_prompts_to_the_longest(batch):
    prompts = pad_rows([[5], [5, 6, 7, 8, 9], [8, 8]], -1, torch.long)
    part = batch.replace(teacher_prompt_ids=prompts).select([2, 0])
    assert part.teacher_prompt_ids.tolist() == [[8, 8], [5, -1]]


def test_selecting_all_rows_changes_nothing(batch):
    same = batch.select([0, 1, 2])
    for item in fields(batch):
        before, after = getattr(batch, item.name), getattr(same, item.name)
        assert torch.equal(before, after) if torch.is_tensor(before) else before == after


def test_to_moves_every_tensor_and_nothing_else(batch):
    moved = batch.replace(metrics={"a": 1.0}).to("meta")
    tensors = [getattr(moved, item.name) for item in fields(moved)]
    assert {t.device.type for t in tensors if torch.is_tensor(t)} == {"meta"}
    assert moved.temperature == 0.7 and moved.metrics == {"a": 1.0}
    assert batch.input_ids.device.type == "cpu"


def test_replace_leaves_the_original_alone(batch):
    changed = batch.replace(rewards=torch.zeros(3))
    assert changed.rewards.tolist() == [0.0] * 3
    assert batch.rewards.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("name", ["rewards", "totals", "anything"])
def test_a_batch_is_frozen(batch, name):
    with pytest.raises(FrozenInstanceError):
        setattr(batch, name, None)


def test_totals_are_frozen():
    with pytest.raises(FrozenInstanceError):
        StepTotals(1, 1, 1, 1, 1).num_prompts = 2


def test_count_counts_tokens_completions_and_prompts(batch):
    assert batch.count(16) == StepTotals(9.0, 9.0, 3.0, 2.0, 16)


def test_count_of_imitated_tokens_is_within_the_loss():
    batch = collate(
        [[5]] * 2,
        [[6, EOS], [7, 7]],
        [0, 1],
        pad_id=PAD,
        truncated=[False, True],
        mask_truncated=True,
    )
    everywhere = batch.replace(imitation_mask=torch.ones(2, 2, dtype=torch.bool))
    assert everywhere.count(2).num_imitated_tokens == 2.0
    first = batch.replace(imitation_mask=torch.tensor([[True, False], [True, False]]))
    assert first.count(2).num_imitated_tokens == 1.0


def test_totals_of_micro_batches_of_whole_groups_add_up_to_the_step(batch):
    parts = [batch.select([0, 1]).count(8), batch.select([2]).count(8)]
    assert parts[0] + parts[1] == batch.count(8)


def test_sum_of_totals_keeps_the_token_limit():
    assert StepTotals(1, 2, 3, 4, 5) + StepTotals(10, 20, 30, 40, 7) == StepTotals(
        11, 22, 33, 44, 7
    )


@pytest.mark.parametrize(
    ("rows", "value", "expected"),
    [
        ([[1, 2], [3], []], 0, [[1, 2], [3, 0], [0, 0]]),
        ([[1], [2, 3, 4]], 9, [[1, 9, 9], [2, 3, 4]]),
        ([[]], 5, [[5]]),
    ],
)
def test_pad_rows_pads_on_the_right(rows, value, expected):
    assert pad_rows(rows, value, torch.long).tolist() == expected


def test_pad_rows_of_nothing_has_no_rows():
    assert pad_rows([], 0, torch.float32).shape == (0, 1)


def test_pad_rows_keeps_the_type():
    assert pad_rows([[0.5]], 0.0, torch.float64).dtype == torch.float64
