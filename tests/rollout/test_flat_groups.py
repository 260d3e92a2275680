"""Refills, advantages and statistics share one definition of a flat group, in the run's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.engines.base import Completion
from kdrl_lightning.losses.advantages import group_relative, shaped
from kdrl_lightning.rewards import RewardRunner, Sample, Verdict
from kdrl_lightning.rollout.generation import Judged
from kdrl_lightning.rollout.refills import fill_groups
from kdrl_lightning.rollout.statistics import RolloutWatch
from kdrl_lightning.rollout_batch import collate, flat_groups

NEARLY = [0.1 + 0.2, 0.3]  # differ in float64, not in float32


@pytest.fixture(params=[torch.float32, torch.float64])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def everywhere(rewards: list[float]) -> tuple[bool, bool, bool, bool]:
    """Is it replaced, without advantage (in two ways), counted as flat?"""
    group = [Judged([1], {}, Completion([2], [0.0], False), "", Verdict(r, False)) for r in rewards]
    other = [
        Judged([1], {}, Completion([2], [0.0], False), "", Verdict(r, False)) for r in (0.0, 1.0)
    ]
    _, replaced = fill_groups([0], lambda slots, attempt: [other if attempt else group], 1)
    size = len(rewards)
    batch = collate([[1]] * size, [[2]] * size, [0] * size, pad_id=0, rewards=rewards)
    table = batch.rewards[None]
    metrics = RolloutWatch().measure(
        batch, RewardRunner(len), {}, lambda tensor, operation: tensor, compares_group=False
    )
    gaps = torch.zeros_like(table)
    return (
        bool(replaced),
        not group_relative(table).any(),
        not shaped(table, gaps, 1.0).any(),
        metrics["rollout/flat_group_frac"] == 1.0,
    )


def test_values_that_only_differ_in_float64(dtype: torch.dtype) -> None:
    assert everywhere(NEARLY) == (dtype == torch.float32,) * 4
    assert everywhere([1.0, 1.0 + 1e-9]) == (dtype == torch.float32,) * 4
    assert everywhere([0.5, 0.5]) == (True,) * 4
    assert everywhere([0.5, 0.5 + 2**-20]) == (False,) * 4
    assert everywhere([0.0, -0.0]) == (True,) * 4


@given(
    st.lists(st.floats(-2, 2) | st.sampled_from([*NEARLY, 0.6, 3 * 0.2]), min_size=2, max_size=4)
)
def test_the_answers_agree_whatever_the_rewards(rewards: list[float]) -> None:
    assert len(set(everywhere(rewards))) == 1


def test_rewards_are_kept_in_the_type_of_the_run(dtype: torch.dtype) -> None:
    batch = collate([[1]] * 2, [[2]] * 2, [0, 0], pad_id=0, rewards=NEARLY)
    assert batch.rewards.dtype == dtype
    assert batch.rewards.tolist() == torch.tensor(NEARLY, dtype=dtype).tolist()
    assert collate([[1]], [[2]], [0], pad_id=0).rewards.dtype == dtype


def test_in_half_precision_rewards_are_float32() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        batch = collate([[1]] * 2, [[2]] * 2, [0, 0], pad_id=0, rewards=[0.1, 0.3])
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch.rewards.dtype == torch.float32


def test_each_group_has_its_own_answer() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0]), torch.tensor([1, 0, 1, 0, 2])
    assert flat_groups(rewards, groups).tolist() == [True, True, True]
    assert flat_groups(torch.tensor([1.0, 0.0]), torch.tensor([0, 0])).tolist() == [False]
    assert flat_groups(torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []


@pytest.mark.filterwarnings("ignore:.* of the completions are cut:UserWarning")
@pytest.mark.filterwarnings("ignore:.* of the groups have equal rewards:UserWarning")
@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)]
)
def test_a_run_keeps_rewards_in_its_precision(
    tmp_path: Path, student_folder: str, precision: str, dtype: torch.dtype
) -> None:
    def nearly(sample: Sample) -> float:
        return NEARLY[len(sample.ids) % 2]

    module = make_module(student_folder, None, GRPO())
    data = make_data(reward=nearly)
    make_trainer(tmp_path, max_steps=1, precision=precision).fit(module, datamodule=data)
    batch = data.rollouts.plan.batch  # type: ignore[union-attr]
    assert batch.rewards.dtype == dtype
    assert set(batch.rewards.tolist()) <= set(torch.tensor(NEARLY, dtype=dtype).tolist())
    assert batch.advantages is not None and batch.advantages.dtype == dtype
