"""SCOPE (arXiv 2604.10688): two sets of weights in each group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.objective_rows import LENGTHS, scope, scope_weights, slow, tables
from helpers.objective_steps import CORRECT, GROUPS, graded, ready, step, student
from helpers.reference import close, f64
from kdrl_lightning import SCOPE, ConfigurationError
from kdrl_lightning.objectives import GapAdvantage, RarityWeights, TokenRatio
from kdrl_lightning.objectives.policy import PolicyObjective


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_it_is_the_paper_s_loss_token_by_token(tau: float, scale: Any) -> None:
    objective = SCOPE(tau, scale, reduction="constant_length")
    batch = ready(objective, step())
    scores = student(batch)
    x = tables(batch, scores)
    close(batch.advantages, scope_weights(x, scale, tau))
    value, gradient = slow("constant_length", lambda i, t: scope(x, i, t, scale, tau))
    loss, gradients = graded(objective, batch, scores)
    close(loss, value)
    close(gradients["logprobs"], gradient)


@pytest.mark.parametrize(("scale", "sums"), [("sum", 1.0), ("mean", None)])
def test_each_set_has_its_sum(scale: Any, sums: float | None) -> None:
    weights = ready(SCOPE(scale=scale), batch := step(mixed=False)).advantages
    for group in set(GROUPS):
        for verdict in (True, False):
            rows = [
                i
                for i, g in enumerate(GROUPS)
                if g == group and CORRECT[i] == verdict and LENGTHS[i]
            ]
            close(weights[rows].sum(), (sums or len(rows)) if rows else 0.0)
            if len(rows) == 1 and scale == "sum":
                assert weights[rows].item() == 1.0
    assert weights[~batch.loss_mask.any(1)].eq(0).all()


def test_an_infinite_temperature_weights_all_alike() -> None:
    weights = ready(SCOPE(None, "mean"), batch := step(mixed=False)).advantages
    close(weights, batch.loss_mask.any(1).double())


def test_all_wrong_is_weighted_distillation() -> None:
    """With equal weights of mean 1 it is on-policy distillation without a clip."""
    batch = step(mixed=False)
    batch = batch.replace(correct=torch.zeros_like(batch.correct))
    scores = student(batch)
    ours = SCOPE(None, "mean")
    plain = PolicyObjective(TokenRatio(1.0, 1e30), GapAdvantage())
    found, expected = (graded(o, ready(o, batch), scores) for o in (ours, plain))
    close(found[0], expected[0])
    close(found[1]["logprobs"], expected[1]["logprobs"])


def test_at_ratio_one_correct_completions_get_a_weighted_likelihood() -> None:
    batch = step(mixed=False)
    objective = SCOPE(reduction="constant_length")
    batch = ready(objective, batch.replace(correct=torch.ones_like(batch.correct)))
    scores = student(batch, near=0.0)
    found = graded(objective, batch, scores)[1]["logprobs"]
    used = int(batch.loss_mask.any(1).sum())
    expected = -batch.advantages[:, None] * batch.loss_mask / (used * 9)
    close(found, expected)


def test_a_rare_success_counts_more_and_a_puzzling_failure_less() -> None:
    batch = step(mixed=False).select([0, 1, 2, 3])
    likely = f64([-0.1, -0.1, -2.0, -2.0])[:, None].expand_as(batch.old_logprobs)
    batch = batch.replace(
        old_logprobs=likely,
        teacher_logprobs=likely,
        correct=torch.tensor([True, False, True, False]),
    )
    weights = RarityWeights().prepare(batch.replace(imitation_mask=batch.loss_mask))
    assert weights[2] > weights[0] and weights[1] > weights[3]


def test_wrong_rows_without_a_context_are_in_no_set() -> None:
    batch = step(mixed=False)
    batch = batch.replace(has_context=torch.arange(16) % 2 == 0)
    weights = ready(SCOPE(), batch).advantages
    without = ~batch.has_context & ~batch.correct
    assert weights[without].eq(0).all() and without.any()
    close(weights[[1, 2]], [0.0, 1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_temperature": 0.0}, "`weight_temperature` must be above 0: got 0.0"),
        ({"scale": "size"}, "`scale` must be sum or mean: got size"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SCOPE(**settings)
