"""The engine's correction: its levels by hand, and when it is on without being asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import (
    GRPO,
    KDRL,
    Advantage,
    BehaviorRatio,
    MaskedImportance,
    NoCorrection,
    PolicyObjective,
    TruncatedImportance,
    WeightedSum,
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


def prepared(objective: PolicyObjective | WeightedSum, exact: bool) -> torch.Tensor | None:
    return objective.prepare(rollout(exact)).importance_weights


def test_on_where_the_engine_is_not_exact_and_off_where_it_is() -> None:
    assert prepared(GRPO(), exact=True) is None
    expected = torch.tensor([[2.0, 2.0, 0.5], [0.25, 1.0, 1.0]])
    for objective in (GRPO(), KDRL(), WeightedSum(GRPO(), KDRL())):
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


def test_a_sum_of_two_objectives_takes_the_correction_of_the_first() -> None:
    masked = prepared(
        WeightedSum(GRPO(engine_correction=MaskedImportance(0.4, 3.0)), KDRL()), exact=False
    )
    assert masked is not None and masked[0].tolist() == [1.0, 0.0, 1.0]
    none = WeightedSum(GRPO(engine_correction=NoCorrection()), KDRL())
    assert prepared(none, exact=False) is None
