"""Rollout metrics worked out by hand, and the two warnings."""

from __future__ import annotations

import warnings

import pytest
import torch

from helpers.one_rank import alone
from kdrl_lightning.rewards import RewardFailures, RewardRunner, Sample
from kdrl_lightning.rollout.statistics import RolloutWatch
from kdrl_lightning.rollout_batch import STUDENT, TEACHER, RolloutBatch, collate


def rollout(
    rewards: list[float], groups: list[int], cut: list[bool] | None = None, tokens: int = 2
) -> RolloutBatch:
    size = len(rewards)
    return collate(
        [[5]] * size,
        [[6] * tokens] * size,
        groups,
        pad_id=0,
        rewards=rewards,
        correct=[r >= 1 for r in rewards],
        truncated=cut or [False] * size,
    )


def judge(failures: int = 0) -> RewardRunner:
    def reward(sample: Sample) -> float:
        if sample.text == "fails":
            raise OSError
        return 0.0

    runner = RewardRunner(reward, RewardFailures(1.0))
    for training, count in ((True, failures), (False, 2)):  # an evaluation's do not count
        with warnings.catch_warnings(action="ignore"):
            runner([Sample("fails", [], {})] * count, training)
    return runner


def measure(
    batch: RolloutBatch,
    watch: RolloutWatch | None = None,
    compares_group: bool = True,
    **seconds: float,
):
    return (watch or RolloutWatch()).measure(batch, judge(), seconds, alone, compares_group)


def test_metrics_by_hand():
    batch = collate(
        [[5]] * 4,
        [[6], [6, 7], [6, 7, 8], [6, 7]],
        [0, 0, 1, 1],
        pad_id=0,
        rewards=[1.0, 0.0, 0.25, 0.25],
        correct=[True, False, False, False],
        truncated=[False, False, True, False],
    )
    metrics = RolloutWatch().measure(
        batch, judge(3), {"time/rollout_s": 2.0, "time/score_s": 0.5}, alone
    )
    assert metrics == {
        "reward/mean": 0.375,
        "reward/correct_frac": 0.25,
        "reward/failures": 3.0,
        "rollout/length_mean": 2.0,
        "rollout/truncated_frac": 0.25,
        "rollout/flat_group_frac": 0.5,
        "rollout/refilled_groups": 0.0,
        "tokens_per_s": 4.0,
        "time/rollout_s": 2.0,
        "time/score_s": 0.5,
    }


def test_failures_are_those_of_the_rollout_alone():
    runner, batch = judge(3), rollout([1.0, 0.0], [0, 0])
    counts = [RolloutWatch().measure(batch, runner, {}, alone)["reward/failures"] for _ in range(2)]
    assert counts == [3.0, 0.0]
    assert runner.failures == 5


def test_ranks_are_summed_before_dividing():
    # The other rank has three times the counts of this one, except for twice the tokens.
    def two_ranks(tensor, operation):
        other = 3 * tensor
        for tokens in (3, 11):  # the student's, all
            other[tokens] = 2 * tensor[tokens]
        return tensor + other

    watch = RolloutWatch()
    metrics = watch.measure(
        rollout([1.0, 0.0], [0, 0]), judge(1), {"time/rollout_s": 3.0}, two_ranks
    )
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/failures"] == 4.0
    assert metrics["rollout/length_mean"] == 12 / 8
    assert metrics["tokens_per_s"] == 4.0
    assert watch.tokens == 12


def test_the_run_is_added_up():
    watch = RolloutWatch()
    measure(rollout([1.0, 0.0], [0, 0], tokens=3), watch, **{"time/rollout_s": 1.0})
    measure(rollout([1.0, 0.0], [0, 0]), watch, **{"time/rollout_s": 0.5, "time/sync_s": 0.25})
    assert watch.rollouts == 2
    assert watch.tokens == 10
    assert watch.seconds == {"time/rollout_s": 1.5, "time/sync_s": 0.25}


def test_flat_groups_warn_once_with_the_figure():
    watch = RolloutWatch()
    flat = rollout([0.0] * 12, [i // 2 for i in range(12)])
    with pytest.warns(UserWarning, match=r"100% of the groups have equal rewards"):
        measure(flat, watch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure(flat, watch)["rollout/flat_group_frac"] == 1.0


def test_flat_groups_are_no_worry_where_groups_are_not_compared():
    watch = RolloutWatch()
    flat = rollout([0.0] * 12, [i // 2 for i in range(12)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure(flat, watch, compares_group=False)["rollout/flat_group_frac"] == 1.0
    # Nothing was said so far, so it still can be.
    with pytest.warns(UserWarning, match=r"100% of the groups have equal rewards"):
        measure(flat, watch)


def test_groups_are_compared_unless_said_otherwise():
    with pytest.warns(UserWarning, match=r"100% of the groups have equal rewards"):
        RolloutWatch().measure(rollout([0.0, 0.0], [0, 0]), judge(), {}, alone)


def test_groups_of_one_have_equal_rewards():
    alone_in_its_group = rollout([0.0, 1.0], [0, 1])
    with pytest.warns(UserWarning, match=r"100% of the groups have equal rewards"):
        assert measure(alone_in_its_group)["rollout/flat_group_frac"] == 1.0


def test_truncated_completions_warn_where_groups_are_not_compared():
    with pytest.warns(UserWarning) as caught:
        measure(rollout([0.0, 0.0], [0, 0], cut=[True, True]), compares_group=False)
    assert [str(w.message).split(".")[0] for w in caught] == [
        "100% of the completions are cut at `max_tokens`"
    ]


def test_truncated_completions_warn_once_with_the_figure():
    watch = RolloutWatch()
    cut = rollout([0.0, 1.0] * 2, [0, 0, 1, 1], cut=[True, True, True, False])
    with pytest.warns(UserWarning, match=r"75% of the completions are cut at `max_tokens`"):
        measure(cut, watch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(cut, watch)


def test_both_warnings_may_come_from_one_rollout():
    with pytest.warns(UserWarning) as caught:
        measure(rollout([0.0, 0.0], [0, 0], cut=[True, True]))
    assert [str(w.message).split(".")[0] for w in caught] == [
        "100% of the groups have equal rewards and give no policy gradient",
        "100% of the completions are cut at `max_tokens`",
    ]


@pytest.mark.parametrize(
    "batch",
    [
        # 4 of 5 groups flat: at the bound, not above it.
        rollout([0.0, 0.0] * 4 + [0.0, 1.0], [i // 2 for i in range(10)]),
        # Half of the completions cut.
        rollout([0.0, 1.0], [0, 0], cut=[True, False]),
    ],
)
def test_no_warning_at_the_bounds(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(batch)


def test_the_warning_speaks_of_all_ranks():
    def two_ranks(tensor, operation):
        other = tensor.clone()
        other[4] = 0.0  # truncated
        return tensor + other

    cut = rollout([0.0, 1.0], [0, 0], cut=[True, True])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = RolloutWatch().measure(cut, judge(), {}, two_ranks)
    assert metrics["rollout/truncated_frac"] == 0.5


def test_contexts_are_counted_over_ranks_and_their_lack_is_told_once():
    batch, watch = rollout([0.0] * 4, [0, 0, 1, 1]), RolloutWatch()
    assert watch.measure_contexts(batch, 0, alone) == {}
    some = batch.replace(has_context=torch.tensor([True, False, True, True]))
    found = watch.measure_contexts(some, 1, lambda values, _: 2 * values)  # two equal ranks
    assert found == {"kd/context_frac": 0.75, "kd/context_dropped_frac": 0.25}
    none = batch.replace(has_context=torch.zeros(4, dtype=torch.bool))
    with pytest.warns(UserWarning, match=r"^100% of the completions have no context for the teac"):
        watch.measure_contexts(none, 0, alone)
    watch.measure_contexts(none, 0, alone)  # warnings are errors


def test_what_a_rollout_does_not_measure_is_a_gap_also_after_a_resume():
    """A rollout may lack the teacher's completions, or a kind of reward."""
    students = rollout([0.5] * 4, [0, 0, 1, 1])
    both = students.replace(source=torch.tensor([STUDENT, STUDENT, TEACHER, TEACHER]))
    watch = RolloutWatch()
    first = watch.with_gaps({**measure(both, watch, False), "reward/style_mean": 1.0})
    assert first["teacher/reward_mean"] == 0.5 and None not in first.values()
    gone = {f"teacher/{name}" for name in ("reward_mean", "correct_frac", "length_mean")}
    again = RolloutWatch()
    again.load_state_dict(watch.state_dict())
    for one in watch, again:
        second = one.with_gaps(measure(students, one, False))
        assert {name for name, value in second.items() if value is None} == {
            *gone,
            "reward/style_mean",
        }
        third = one.with_gaps(measure(both, one, False))
        assert third["teacher/length_mean"] == first["teacher/length_mean"]
    old = {name: value for name, value in watch.state_dict().items() if name != "names"}
    again.load_state_dict(old)
    assert None not in again.with_gaps({"reward/mean": 1.0}).values()
