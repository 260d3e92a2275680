"""A step's statistics of scores: engine against trainer, and the teacher's values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.losses.logprobs import LOGPROB_FLOOR
from kdrl_lightning.metrics.update_stats import UpdateStats
from kdrl_lightning.rollout_batch import STUDENT, TEACHER, RolloutBatch, collate

OURS, ENGINES = [[-1.0, -2.0], [-0.5, -3.0]], [[-1.5, -1.75], [-0.5, -3.0]]


def rollout(*lengths: int) -> RolloutBatch:
    return collate([[5]] * len(lengths), [[6] * n for n in lengths], [0] * len(lengths), pad_id=0)


def scored(
    ours: list[list[float]], engines: list[list[float]], batch: RolloutBatch
) -> RolloutBatch:
    return batch.replace(old_logprobs=torch.tensor(ours), rollout_logprobs=torch.tensor(engines))


def measure(*batches: RolloutBatch, reduce: Any = None) -> dict[str, float | None]:
    """Return what a step says of its scores alone."""
    stats = UpdateStats()
    for batch in batches:
        stats.add(batch, torch.zeros(batch.loss_mask.shape), torch.tensor(0.5), {})
    values = stats.finish(reduce)
    assert values.pop("loss/total") == stats.loss == 0.5 * len(batches)
    assert values.pop("policy/entropy") == 0.0
    return values


def test_mismatch_is_zero_for_equal_logprobs() -> None:
    assert measure(scored(OURS, OURS, rollout(2, 2))) == {"rollout/mismatch_kl": 0.0}


def test_mismatch_is_the_mean_of_k3_over_tokens() -> None:
    # With d = trainer - engine, k3 is exp(d) - 1 - d.
    expected = (math.expm1(0.5) - 0.5 + math.expm1(-0.25) + 0.25) / 4
    batch = scored(OURS, ENGINES, rollout(2, 2))
    for parts in ([batch], [batch.select([0]), batch.select([1])]):
        assert measure(*parts)["rollout/mismatch_kl"] == pytest.approx(expected, abs=1e-12)


def test_mismatch_ignores_padding() -> None:
    gap = scored([[-1.0, -2.0], [-0.5, math.inf]], [[-1.0, -2.0], [-0.5, math.nan]], rollout(2, 1))
    assert measure(gap)["rollout/mismatch_kl"] == 0.0


def test_mismatch_ignores_the_teachers_completions() -> None:
    batch = scored(OURS, [[-1.0, -2.0], [-9.0, -9.0]], rollout(2, 2))
    batch = batch.replace(source=torch.tensor([0, TEACHER]))
    assert measure(batch)["rollout/mismatch_kl"] == 0.0


@pytest.mark.parametrize("side", ["old_logprobs", "rollout_logprobs"])
def test_mismatch_is_not_measured_where_a_side_is_missing(side: str) -> None:
    assert not measure(scored(OURS, OURS, rollout(2, 2)).replace(**{side: None}))


def test_mismatch_estimates_the_kl_from_engine_to_trainer() -> None:
    generator = torch.Generator().manual_seed(0)
    engine = torch.randn(7, generator=generator).log_softmax(-1)
    trainer = (engine + 0.3 * torch.randn(7, generator=generator)).log_softmax(-1)
    # Each token as often as the engine samples it in 20 000 draws.
    counts = (engine.exp() * 20_000).round().long()
    tokens = torch.arange(7).repeat_interleave(counts)
    gap = scored([trainer[tokens].tolist()], [engine[tokens].tolist()], rollout(len(tokens)))
    exact = float((engine.exp() * (engine - trainer)).sum())
    # Counts are rounded to one in twenty thousand.
    assert measure(gap)["rollout/mismatch_kl"] == pytest.approx(exact, abs=1e-4)


def test_floored_tokens_are_a_share_of_the_completions() -> None:
    floor = LOGPROB_FLOOR
    batch = rollout(2, 1).replace(teacher_logprobs=torch.tensor([[-1.0, floor], [floor, floor]]))
    assert measure(batch) == {"kd/floored_frac": pytest.approx(2 / 3)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_teacher_without_numbers_stops_all_ranks_with_the_count(value: float) -> None:
    first = rollout(2, 2).replace(teacher_logprobs=torch.full((2, 2), -1.0))
    second = first.replace(teacher_logprobs=torch.tensor([[-1.0, value], [-1.0, -1.0]]))
    with pytest.raises(TrainingStopped, match=r"must be finite: got 2 NaN or infinite of 16\."):
        measure(first, second, reduce=lambda table, operation: 2 * table)  # two equal ranks


def test_without_a_teacher_there_is_nothing_to_check() -> None:
    values = measure(scored(OURS, OURS, rollout(2, 2)))
    assert list(values) == ["rollout/mismatch_kl"]


def test_tokens_without_a_score_and_sizes_of_chunks_are_counted() -> None:
    """Of the student's 7 tokens 3 have no score; its chunks have 2, 1 and 1 tokens."""
    places = torch.tensor([[0, 1, 0, -1], [-1, -1, 0, 0], [0, 1, 2, 3]])
    batch = rollout(4, 3, 4).replace(
        chunk_places=places,
        teacher_logprobs=torch.full((3, 4), -1.0),
        source=torch.tensor([STUDENT, STUDENT, TEACHER]),
    )
    expected = {
        "kd/unaligned_frac": pytest.approx(3 / 7),
        "kd/chunk_tokens_mean": pytest.approx(4 / 3),
        "kd/chunk_tokens_max": 2.0,
    }
    assert measure(batch) == expected
    assert measure(batch.select([0]), batch.select([1, 2])) == expected
