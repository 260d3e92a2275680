"""A run that is stopped after any step and resumed equals the run that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.resumed_runs import Run, Setting, run, same_batches, same_weights
from kdrl_lightning import GRPO, KDRL, RLAD
from kdrl_lightning.callbacks import CoefficientSchedule
from kdrl_lightning.callbacks.schedules import Linear, PlateauSwitch
from kdrl_lightning.objectives import GKD, ShapedProbability, TruncatedImportance

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*of the (completions|groups):UserWarning",
        "ignore:The number of training batches:UserWarning",
    ),
]


def plateau() -> list[Any]:
    return [CoefficientSchedule("teacher_kl_coef", PlateauSwitch(0.5, 0.1, patience=1))]


def line() -> list[Any]:
    return [CoefficientSchedule("trrd_alpha", Linear(0.9, 0.4, end_step=3))]


# Per method: objective, data, trainer, schedules.
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], Any]] = {
    "RLAD, annealed, two replays": (
        lambda: RLAD(0.7),
        {"epochs_per_rollout": 2},  # four updates a rollout
        {"accumulate_grad_batches": 2},
        line,
    ),
    "KDRL, reference, engine correction, plateau": (
        lambda: KDRL(0.5, ref_kl_coef=0.1, engine_correction=TruncatedImportance(2.0)),
        {"rollouts_per_epoch": 1},  # a validation after each rollout
        {},
        plateau,
    ),
    "GKD, top-k": (
        lambda: GKD(top_k=4),
        {"minibatches_per_rollout": 4, "rollouts_per_epoch": 1},
        {"gradient_clip_val": 0.5},
        list,
    ),
    "full vocabulary, correction, four mini-batches": (
        lambda: KDRL(
            0.5, kl_estimator="full_vocabulary", engine_correction=TruncatedImportance(2.0)
        ),
        {"minibatches_per_rollout": 4},
        {"accumulate_grad_batches": 2},
        list,
    ),
    "GRPO, refills": (
        lambda: GRPO(),
        {"max_refills": 2, "group_size": 2, "val_prompts": None},
        {"accumulate_grad_batches": 2},
        list,
    ),
    "LUFFY, teacher's completions, validation within a rollout": (
        lambda: GRPO(teacher_tokens=ShapedProbability()),
        {"teacher_completions": 2, "epochs_per_rollout": 2},
        {"val_check_interval": 3},
        list,
    ),
}


def equal_from(step: int, whole: Run, rest: Run, accumulate: int) -> None:
    """Check that ``rest`` is the part of ``whole`` from ``step`` on, and ends as it does."""
    same_batches(whole.seen[step * accumulate :], rest.seen)
    last = whole.logged()[step - 1] if step else {}
    for ours, theirs in zip(whole.logged()[step:], rest.logged(), strict=True):
        # A value that was logged last before the stop is not shown again; all others are.
        old = {n: last[n] for n in ours.keys() - theirs.keys()}
        assert old == pytest.approx({n: ours[n] for n in old}, rel=0, abs=0, nan_ok=True)
        assert theirs == pytest.approx({n: ours[n] for n in theirs}, rel=0, abs=0, nan_ok=True)
    same_weights(whole.weights(), rest.weights())
    assert rest.report.accuracy == whole.report.accuracy
    assert rest.report.curves == whole.report.curves
    assert rest.stats.rows == whole.stats.rows
    totals = [(r.data.watch.rollouts, r.data.watch.completions, r.data.watch.tokens)
              for r in (whole, rest)]  # fmt: skip
    assert totals[0] == totals[1]
    assert rest.data.watch.seconds.keys() == whole.data.watch.seconds.keys()
    states = [[c.state_dict() for c in r.callbacks if isinstance(c, CoefficientSchedule)]
              for r in (whole, rest)]  # fmt: skip
    assert states[0] == states[1]


@pytest.mark.parametrize("case", CASES)
def test_stopped_behind_any_step_it_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, student_folder: str, teacher_folder: str, case: str
) -> None:
    objective, data, changes, callbacks = CASES[case]
    setting = Setting(student_folder, teacher_folder, objective, data, changes, callbacks)
    accumulate = changes.get("accumulate_grad_batches", 1)
    plain = run(tmp_path / "plain", setting, save="never")
    whole = run(tmp_path / "whole", setting, save="steps")
    equal_from(0, plain, whole, accumulate)  # saving changes nothing
    assert sorted(whole.checkpoints) == list(range(1, 9))
    early, late = torch.load(whole.checkpoints[1])["state_dict"], whole.module.state_dict()
    assert all(not torch.equal(value, late[name]) for name, value in early.items())
    for step in range(1, 8):
        rest = run(tmp_path / f"rest{step}", setting, whole.checkpoints[step])
        equal_from(step, whole, rest, accumulate)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_full"])
def test_sharded_it_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, student_folder: str, teacher_folder: str, strategy: str
) -> None:
    objective = KDRL(0.5, ref_kl_coef=0.1)
    changes = {"strategy": strategy, "devices": 1, "max_steps": 6}
    folders = student_folder, teacher_folder
    setting = Setting(*folders, lambda: objective, {"epochs_per_rollout": 2}, changes)
    try:
        whole = run(tmp_path / "whole", setting, save="steps")
        assert all(Path(p).is_dir() == (strategy == "fsdp2") for p in whole.checkpoints.values())
        for step in (1, 4, 5):
            rest = run(tmp_path / f"rest{step}", setting, whole.checkpoints[step])
            equal_from(step, whole, rest, 1)
    finally:
        torch.distributed.destroy_process_group()
