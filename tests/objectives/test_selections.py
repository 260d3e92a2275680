"""Selections: verdicts, gates and end tokens by hand; what an empty selection means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.objective_steps import (
    CORRECT,
    CUT,
    GROUPS,
    THEIRS,
    Keep,
    graded,
    ready,
    same,
    step,
    student,
)
from helpers.reference import close, f64
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import (
    GKD,
    GRPO,
    KDRL,
    RLAD,
    RLSD,
    SRPO,
    ExceptEndToken,
    GapAdvantage,
    Gates,
    OnPolicyDistillation,
    PolicyObjective,
    TokenRatio,
    WrongCompletions,
    WrongGroups,
)
from kdrl_lightning.rollout_batch import RolloutBatch, collate

# Old log-probs are -1; gaps log pi_T - log pi_old, entropies and advantages by hand.
GAPS = [[0.1, -0.5, 1.0], [-0.2, 0.3, 9.0]]
ENTROPY = [[0.5, 2.0, 1.0], [0.0, 1.5, 9.0]]


def two(**changes: Any) -> RolloutBatch:
    batch = collate([[1], [1]], [[1, 2, 3], [4, 5]], [0, 0], pad_id=0)
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    return batch.replace(
        rewards=f64([1.0, 0.0]),
        old_logprobs=old,
        teacher_logprobs=old + f64(GAPS),
        old_entropy=f64(ENTROPY),
        advantages=f64([0.7, -0.7]),
        **changes,
    )


@pytest.mark.parametrize(
    ("gates", "kept"),
    [
        (Gates(), [[1, 1, 1], [1, 1, 0]]),
        (Gates(alignment_threshold=0.4), [[1, 0, 0], [1, 1, 0]]),
        (Gates(alignment_threshold=0.0), [[0, 0, 0], [0, 0, 0]]),
        # Means .5333 and .25: the garbage after the second's end does not count.
        (Gates(alignment_threshold=0.26, alignment_per="completion"), [[0, 0, 0], [1, 1, 0]]),
        (Gates(alignment_threshold=0.54, alignment_per="completion"), [[1, 1, 1], [1, 1, 0]]),
        (Gates(advantage_threshold=0.0), [[1, 1, 1], [0, 0, 0]]),
        (Gates(advantage_threshold=-0.7), [[1, 1, 1], [1, 1, 0]]),
        (Gates(advantage_threshold=0.71), [[0, 0, 0], [0, 0, 0]]),
        (Gates(exploration_entropy=1.0), [[1, 0, 1], [1, 0, 0]]),
        (Gates(exploration_entropy=0.0), [[0, 0, 0], [1, 0, 0]]),
        (Gates(0.6, 0.0, 1.0), [[1, 0, 0], [0, 0, 0]]),
    ],
)
def test_each_gate_by_hand(gates: Gates, kept: list[list[int]]) -> None:
    assert torch.equal(gates(two()), torch.tensor(kept).bool())


@pytest.mark.parametrize(
    ("gates", "field"),
    [
        (Gates(1.0), "old_logprobs"),
        (Gates(1.0), "teacher_logprobs"),
        (Gates(None, 0.0), "advantages"),
        (Gates(None, None, 1.0), "old_entropy"),
    ],
)
def test_a_gate_names_what_it_misses(gates: Gates, field: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"`{field}` must be present"):
        gates(two().replace(**{field: None}))


@given(st.floats(0.0, 3.0), st.floats(-1.0, 1.0), st.floats(0.0, 2.0))
def test_three_gates_keep_tokens_where_the_teacher_says_little(
    near: float, benefit: float, entropy: float
) -> None:
    batch = ready(KDRL(selection=[Gates(near, benefit, entropy)]), step())
    kept = batch.imitation_mask
    gap = (batch.teacher_logprobs - batch.old_logprobs).abs()
    wanted = batch.advantages[:, None].expand_as(gap)
    assert (gap[kept] <= near).all()
    assert (wanted[kept] >= benefit).all()
    assert (batch.old_entropy[kept] <= entropy).all()
    left = batch.student_mask & ~kept
    assert ((gap > near) | (wanted < benefit) | (batch.old_entropy > entropy))[left].all()


def test_verdicts_select() -> None:
    batch = step()
    assert WrongCompletions()(batch).tolist() == [not c for c in CORRECT]
    assert WrongGroups()(batch).tolist() == [g == 2 for g in GROUPS]  # the only one all wrong


def test_the_end_token_is_left_out_unless_there_is_none() -> None:
    batch = two(truncated=torch.tensor([False, True]))
    assert ExceptEndToken()(batch).tolist() == [[True, True, False], [True, True, True]]
    batch = two(truncated=torch.tensor([True, False]))
    assert (ExceptEndToken()(batch) & batch.loss_mask).tolist() == [
        [True, True, True],
        [True, False, False],
    ]


def test_selections_intersect() -> None:
    batch = step()
    objective = KDRL(selection=[WrongCompletions(), ExceptEndToken(), Gates(1.0)])
    expected = batch.student_mask
    for selection in objective.selection:
        mask = selection(batch)
        expected = expected & (mask if mask.dim() == 2 else mask[:, None])
    prepared = ready(objective, batch)
    assert torch.equal(prepared.imitation_mask, expected)
    assert expected.any() and expected.sum() < batch.student_mask.sum()
    assert prepared.totals.num_imitated_tokens == expected.sum()


def test_without_a_selection_all_tokens_are_imitated_that_can_be() -> None:
    batch = step()
    for objective in (KDRL(), RLAD(), OnPolicyDistillation(), SRPO()):
        assert torch.equal(ready(objective, batch).imitation_mask, batch.student_mask)
    for objective in (GKD(), KDRL(kl_estimator="top_k")):  # whole distributions
        assert torch.equal(ready(objective, batch).imitation_mask, batch.loss_mask)
    assert not batch.loss_mask[torch.tensor(CUT)].any()


def test_a_group_is_wrong_if_the_student_never_solves_it() -> None:
    batch = step()
    batch = batch.replace(correct=batch.source.bool())  # the teacher always does
    assert WrongGroups()(batch).all()
    assert WrongCompletions()(batch).tolist() == [not x for x in THEIRS]


@pytest.mark.parametrize("selection", [WrongCompletions(), WrongGroups()])
@pytest.mark.parametrize("form", ["joint", "advantage", "reward_shaping"])
def test_a_group_all_correct_has_no_teacher(selection: Any, form: Any) -> None:
    batch = step().replace(correct=torch.ones(16, dtype=torch.bool))
    objective = KDRL(0.5, form=form, selection=[selection])
    same(objective, GRPO(), batch)
    _, shares = objective(ready(objective, batch), student(batch))
    assert shares.get("teacher_kl", torch.zeros(())) == 0


def test_response_and_group_masks_differ_in_mixed_groups() -> None:
    batch = step()
    response, group = (
        ready(KDRL(selection=[s]), batch).imitation_mask
        for s in (WrongCompletions(), WrongGroups())
    )
    assert (response | group).eq(response).all()
    mixed = torch.tensor([g in (0, 5) for g in GROUPS])
    assert response[mixed].any()
    assert not group[mixed].any()
    assert torch.equal(response[~mixed], group[~mixed])


# --- An empty selection ---


@pytest.mark.parametrize(
    "make",
    [
        lambda s: KDRL(0.5, selection=s),
        lambda s: KDRL(0.5, True, "k3", selection=s),
        lambda s: KDRL(0.5, form="advantage", selection=s),
        lambda s: KDRL(0.5, form="reward_shaping", selection=s),
        lambda s: KDRL(0.5, kd_per_imitated_token=True, selection=s),
        lambda s: KDRL(0.5, kl_estimator="full_vocabulary", selection=s),
        lambda s: RLAD(selection=s),
        lambda s: RLAD(offset_clamp=1.0, selection=s),
        lambda s: RLSD(selection=s),
    ],
)
def test_empty_selection_leaves_grpo(make: Any) -> None:
    batch = step()
    same(make([Keep(torch.zeros_like(batch.loss_mask))]), GRPO(), batch)


def test_empty_selection_leaves_srpo_the_rewards_of_correct_completions() -> None:
    batch = step()
    objective = SRPO(selection=[Keep(torch.zeros_like(batch.loss_mask))])
    scores = student(batch)
    got = graded(objective, ready(objective, batch), scores)[1]["logprobs"]
    grpo = graded(GRPO(), ready(GRPO(), batch), scores)[1]["logprobs"]
    close(got, grpo * torch.tensor(CORRECT)[:, None])


@pytest.mark.parametrize(
    "objective", [OnPolicyDistillation(), PolicyObjective(TokenRatio(), GapAdvantage())]
)
def test_empty_selection_leaves_distillation_nothing(objective: PolicyObjective) -> None:
    batch = step()
    objective.selection = (Keep(torch.zeros_like(batch.loss_mask)),)
    loss, gradients = graded(objective, ready(objective, batch), student(batch))
    assert loss == 0
    assert gradients["logprobs"].eq(0).all()


# --- What is decided in which order ---


def test_shaped_rewards_average_over_selected_tokens_and_divide_by_all() -> None:
    batch = two(correct=torch.tensor([True, False]))
    objective = KDRL(0.5, form="reward_shaping", scale_by_std=False, selection=[Gates(0.4)])
    got = objective.prepare(batch).advantages
    # Mean gaps .1 / 3 and (-.2 + .3) / 2, of three and two tokens; r = 1, 0.
    means = [0.1 / 3, 0.1 / 2]
    centre = sum(means) / 2
    close(got, [0.5 + 0.5 * (means[0] - centre), -0.5 + 0.5 * (means[1] - centre)])


def test_gates_on_advantages_see_those_of_the_rewards() -> None:
    batch = two()
    objective = KDRL(50.0, form="reward_shaping", selection=[Gates(None, 0.1)])
    prepared = objective.prepare(batch)
    assert prepared.imitation_mask.tolist() == [[True] * 3, [False] * 3]
    # Shaped with the selection: only the first completion has a gap, .6 / 3.
    std = math.sqrt(0.5) + 1e-6
    close(prepared.advantages, [(0.5 + 50 * 0.1) / std, (-0.5 - 50 * 0.1) / std])


def test_selections_hold_for_later_updates() -> None:
    """They are made from old log-probs: the current student has no part in them."""
    objective = KDRL(selection=[Gates(0.5)])
    batch = ready(objective, step())
    near, far = student(batch, near=0.0), student(batch, near=2.0)
    masks = [
        t.mask for s in (near, far) for t in objective.terms(batch, s) if t.name == "teacher_kl"
    ]
    assert torch.equal(*masks)
