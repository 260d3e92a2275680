"""Groups with equal rewards are left out of the loss, as if they had not been sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.objective_steps import REDUCTIONS, graded, ready, student
from helpers.reference import close, normal
from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning.objectives import GRPO, KDRL
from kdrl_lightning.rewards import Sample
from kdrl_lightning.rollout_batch import RolloutBatch, collate

LENGTHS, GROUPS = [3, 1, 2, 4, 2, 2], [0, 0, 1, 1, 2, 2]
REWARDS = [1.0, 0.0, 0.1 + 0.2, 0.1 + 0.2, 0.0, 1.0]


def batch(rows: list[int], masked: bool) -> RolloutBatch:
    """Some of the completions, with scores that do not depend on the others."""
    groups = [GROUPS[i] for i in rows]
    made = collate(
        [[1]] * len(rows),
        [[2] * LENGTHS[i] for i in rows],
        [sorted(set(groups)).index(g) for g in groups],
        pad_id=0,
        rewards=[REWARDS[i] for i in rows],
    )
    made = made.without_flat_groups() if masked else made
    width = made.completion_ids.shape[1]
    tables = {
        name: normal(6, 4, seed=seed)[rows, :width] - 3.0
        for seed, name in enumerate(("old_logprobs", "teacher_logprobs", "rollout_logprobs"))
    }
    return made.replace(
        rewards=made.rewards.double(),
        topk_ids=torch.zeros(*made.completion_ids.shape, 1, dtype=torch.long),
        **tables,
    )


def test_a_flat_group_is_out_of_the_loss_and_of_all_counts() -> None:
    masked = batch(list(range(6)), True)
    assert masked.loss_mask.any(1).tolist() == [True, True, False, False, True, True]
    assert torch.equal(masked.completion_mask.sum(1), torch.tensor(LENGTHS))
    assert masked.group_tokens.tolist() == [4.0, 4.0, 0.0, 0.0, 4.0, 4.0]
    assert masked.count(9) == batch([0, 1, 4, 5], False).count(9)
    assert torch.equal(batch(list(range(6)), False).loss_mask, masked.completion_mask)
    assert collate([], [], [], pad_id=0).without_flat_groups().loss_mask.numel() == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_to_mask_a_group_is_to_drop_it(reduction: Any) -> None:
    """Also for the teacher's term and the entropy, which act on such groups otherwise."""
    objective = KDRL(0.3, reduction=reduction, entropy_coef=0.1)
    rows = [0, 1, 4, 5]
    whole, masked, dropped = (
        batch(list(range(6)), False),
        batch(list(range(6)), True),
        batch(rows, False),
    )
    scores = student(whole)
    width = dropped.completion_ids.shape[1]
    few = scores.map(lambda x: x.detach()[rows, :width].requires_grad_())
    got = graded(objective, ready(objective, masked), scores)
    expected = graded(objective, ready(objective, dropped), few)
    unmasked = graded(objective, ready(objective, whole), scores)
    close(got[0], expected[0])
    for name in ("logprobs", "entropy"):
        close(got[1][name][rows, :width], expected[1][name])
        assert (got[1][name][[2, 3]] == 0).all() and (unmasked[1][name][[2, 3]] != 0).any()


def flat_if_odd(sample: Sample) -> float:
    """Completions of one half of the prompts all get the same reward."""
    odd = sum(map(ord, sample.row["prompt"])) % 2
    return 0.5 if odd else float(len(sample.ids) % 2)


@pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
def test_a_run_leaves_flat_groups_out_and_samples_no_others(
    tmp_path: Path, student_folder: str
) -> None:
    data = make_data(val_prompts=None, reward=flat_if_odd, mask_flat_groups=True)
    trace = fit(tmp_path, make_module(student_folder, None, GRPO()), data, max_steps=4)
    kept = 0
    for _, micro in trace.seen:
        for group in micro.group_ids.unique():
            rows = micro.group_ids == group
            flat = bool((micro.rewards[rows] == micro.rewards[rows][0]).all())
            assert bool(micro.loss_mask[rows].any()) is not flat
            kept += not flat
    assert kept
    assert data.watch.completions == data.watch.rollouts * 16
