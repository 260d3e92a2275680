"""A completion that the teacher has no context for is not imitated, and keeps its policy loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.objective_steps import (
    CORRECT,
    TAUGHT,
    Keep,
    graded,
    keep,
    make,
    ready,
    step,
    student,
)
from helpers.reference import close
from kdrl_lightning.objectives import GRPO, RLSD, SRPO, Objective
from kdrl_lightning.rollout_batch import RolloutBatch

CONTEXT = torch.tensor([i % 3 != 1 for i in range(16)])
EXACT = ("opd", "opd-gap", "gkd", "gkd-topk")


def graded_step(objective: Objective, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
    return graded(objective, ready(objective, batch), student(batch))


def near(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    close(ours[0], theirs[0])
    for name, gradient in ours[1].items():
        close(gradient, theirs[1][name])


# In SRPO and in reward shaping a row without context keeps its advantage, which is tested below.
@pytest.mark.parametrize("name", sorted(TAUGHT.keys() - {"srpo", "kdrl-shaping"}))
def test_rows_without_context_are_as_if_a_selection_left_them_out(name: str) -> None:
    batch = step()
    objective = keep(make(name), CONTEXT[:, None].expand(batch.loss_mask.shape))
    near(graded_step(make(name), batch.replace(has_context=CONTEXT)), graded_step(objective, batch))


@pytest.mark.parametrize("name", TAUGHT)
def test_what_the_teacher_says_there_is_not_read(name: str) -> None:
    batch = step().replace(has_context=CONTEXT)
    assert batch.teacher_logprobs is not None and batch.teacher_topk_logprobs is not None
    blank = {
        "teacher_logprobs": torch.where(CONTEXT[:, None], batch.teacher_logprobs, -25.0),
        "teacher_topk_logprobs": torch.where(
            CONTEXT[:, None, None], batch.teacher_topk_logprobs, -25.0
        ),
    }
    near(graded_step(make(name), batch), graded_step(make(name), batch.replace(**blank)))


@pytest.mark.parametrize("name", ["kdrl", "kdrl-shaping", "hdpo", "rlsd", "srpo", "rlad", *EXACT])
def test_without_any_context_only_the_policy_loss_is_left(name: str) -> None:
    batch = step(mixed=False).replace(has_context=torch.zeros(16, dtype=torch.bool))
    loss, gradients = graded_step(make(name), batch)
    if name in EXACT:
        assert loss == 0.0 and not any(g.any() for g in gradients.values())
    else:
        near((loss, gradients), graded_step(GRPO(), batch))


@pytest.mark.parametrize("name", TAUGHT)
def test_a_context_in_every_row_changes_nothing(name: str) -> None:
    every = torch.ones(16, dtype=torch.bool)
    ours = graded_step(make(name), step().replace(has_context=every))
    theirs = graded_step(make(name), step())
    assert ours[0] == theirs[0]
    assert all(torch.equal(g, theirs[1][n]) for n, g in ours[1].items())


def test_a_wrong_row_without_context_keeps_its_advantage_in_srpo() -> None:
    # As in the paper: only wrong rows with a context get the teacher instead of A.
    batch = step(mixed=False).replace(has_context=CONTEXT)
    objective = SRPO()
    ready_batch, scores = ready(objective, batch), student(batch)
    got = objective.token_advantages(ready_batch, scores.logprobs.detach())
    wanted = torch.where(
        (torch.tensor(CORRECT) | ~CONTEXT)[:, None],
        GRPO().prepare(batch).advantages[:, None],
        batch.teacher_logprobs - scores.logprobs.detach(),
    )
    close(got[batch.loss_mask], wanted[batch.loss_mask])


def test_a_row_without_context_keeps_its_advantage_if_the_teacher_shapes_rewards() -> None:
    batch = step(mixed=False).replace(has_context=CONTEXT)
    objective = make("kdrl-shaping")
    made, plain = objective.prepare(batch), GRPO().prepare(batch)
    assert torch.equal(made.advantages[~CONTEXT], plain.advantages[~CONTEXT])
    assert not torch.equal(made.advantages[CONTEXT], plain.advantages[CONTEXT])
    # What the teacher adds is compared among the rows with a context: in a group it sums to 0.
    added = made.advantages - plain.advantages
    for group in batch.group_ids.unique():
        close(added[batch.group_ids == group].sum(), torch.zeros(()), 1e-9)
    changed = objective.imitated(made, student(batch).logprobs.detach())
    assert not changed[~CONTEXT].any()


def test_a_row_without_context_has_weight_1_in_rlsd() -> None:
    batch = ready(RLSD(), step(mixed=False).replace(has_context=CONTEXT))
    got = RLSD().token_advantages(batch, student(batch).logprobs.detach())
    close(got[~CONTEXT], batch.advantages[~CONTEXT, None].expand_as(got[~CONTEXT]))


def test_a_selection_narrows_what_has_a_context() -> None:
    batch = step().replace(has_context=CONTEXT)
    chosen = torch.arange(16) % 2 == 0
    objective = make("kdrl")
    objective.selection = (Keep(chosen),)
    mask = objective.prepare(batch).imitation_mask
    assert torch.equal(mask, batch.student_mask & (CONTEXT & chosen)[:, None])
    assert batch.replace(imitation_mask=mask).count(9).num_imitated_tokens == float(mask.sum())
