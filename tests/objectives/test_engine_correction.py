"""The engine correction: its levels by hand, and when it is on by default."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses import TokenScores
from kdrl_lightning.objectives import (
    GRPO,
    KDRL,
    Advantage,
    BehaviorRatio,
    EngineCorrection,
    MaskedImportance,
    NoCorrection,
    PolicyObjective,
    SurrogateTerm,
    TruncatedImportance,
    TrustRegionRatio,
)
from kdrl_lightning.rollout_batch import RolloutBatch, collate

LOG2 = math.log(2.0)


def rollout(exact: bool = False) -> RolloutBatch:
    """Ratios pi_old / mu: 2, 4, 1/2 of the first completion (product 4); 1/4 of the second."""
    batch = collate(
        [[5], [5]],
        [[6, 7, 8], [6]],
        [0, 0],
        pad_id=0,
        rewards=[1.0, 0.0],
        rollout_logprobs=[[-3.0, -3.0, -3.0], [-3.0]],
    ).replace(engine_exact=exact)
    old = torch.tensor([[LOG2, 2 * LOG2, -LOG2], [-2 * LOG2, 0.0, 0.0]]) - 3.0
    return batch.replace(old_logprobs=old, teacher_logprobs=old)


CASES: dict[str, tuple[Any, list[list[float]]]] = {
    "truncated tokens": (TruncatedImportance(3.0), [[2.0, 3.0, 0.5], [0.25]]),
    "truncated sequences": (TruncatedImportance(3.0, "sequence"), [[3.0] * 3, [0.25]]),
    "sequences below the cap": (TruncatedImportance(9.0, "sequence"), [[4.0] * 3, [0.25]]),
    "masked tokens": (MaskedImportance(0.4, 3.0), [[1.0, 0.0, 1.0], [0.0]]),
    "masked sequences": (MaskedImportance(0.4, 5.0, "sequence"), [[1.0] * 3, [0.0]]),
    "masked above": (MaskedImportance(0.2, 3.0, "sequence"), [[0.0] * 3, [1.0]]),
    "none": (NoCorrection(), [[1.0] * 3, [1.0]]),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_by_hand(case: str) -> None:
    correction, expected = CASES[case]
    batch = rollout()
    weights = correction(batch)
    for row, values, real in zip(weights, expected, batch.completion_mask, strict=True):
        torch.testing.assert_close(row[real], torch.tensor(values))


@pytest.mark.parametrize("correction", [TruncatedImportance, MaskedImportance])
def test_another_level_is_refused(correction: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`level` must be token or sequence: got group"):
        correction(level="group")


def prepared(objective: PolicyObjective, exact: bool) -> torch.Tensor | None:
    return objective.prepare(rollout(exact)).importance_weights


def test_on_where_the_engine_is_not_exact_and_off_where_it_is() -> None:
    assert prepared(GRPO(), exact=True) is None
    expected = torch.tensor([[2.0, 2.0, 0.5], [0.25, 1.0, 1.0]])
    for objective in (GRPO(), KDRL(), two_losses()):
        weights = prepared(objective, exact=False)
        assert weights is not None
        torch.testing.assert_close(weights, expected)


def test_what_is_asked_for_wins() -> None:
    assert prepared(GRPO(engine_correction=NoCorrection()), exact=False) is None
    masked = prepared(GRPO(engine_correction=MaskedImportance(0.4, 3.0)), exact=False)
    assert masked is not None and masked[0].tolist() == [1.0, 0.0, 1.0]
    own = prepared(GRPO(engine_correction=TruncatedImportance(3.0)), exact=True)
    assert own is not None and own[0].tolist() == pytest.approx([2.0, 3.0, 0.5])


def test_a_ratio_to_the_engine_is_not_corrected_twice() -> None:
    assert prepared(PolicyObjective(BehaviorRatio(), Advantage()), exact=False) is None


def two_losses(**policy: Any) -> GRPO:
    return GRPO(distill=SurrogateTerm(TrustRegionRatio(), 2.0), **policy)


@pytest.mark.parametrize("correction", [None, MaskedImportance(0.4, 3.0), NoCorrection()])
def test_both_of_two_losses_are_corrected(correction: EngineCorrection | None) -> None:
    """Each token's losses are those of an exact engine, times its weight."""
    objective = two_losses(engine_correction=correction)
    batch = rollout().replace(advantages=torch.tensor([1.0, -1.0]))
    weights = prepared(objective, exact=False)
    prepared_batch = objective.prepare(batch)
    scores = TokenScores(batch.old_logprobs + 0.1, None, None, None, None)
    plain = {
        t.name: t
        for t in two_losses().terms(prepared_batch.replace(importance_weights=None), scores)
    }
    corrected = {t.name: t for t in objective.terms(prepared_batch, scores)}
    assert plain.keys() == corrected.keys() == {"policy", "distill_policy"}
    for name, term in corrected.items():
        expected = plain[name].per_token * (1.0 if weights is None else weights)
        torch.testing.assert_close(term.per_token, expected)
    if isinstance(correction, NoCorrection):
        assert weights is None
    else:
        assert weights is not None and (weights != 1.0).any()
