"""KDRL-Annealing: the schedule, its units and refused settings."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.reference import close
from kdrl_lightning.callbacks import KLCoefficientAnnealing
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import GRPO, KDRL, OnPolicyDistillation


def test_published_schedule() -> None:
    annealing = KLCoefficientAnnealing()
    for step, coef in [(0, 5e-3), (1, 4.95e-3), (20, 4e-3), (40, 3e-3), (79, 1.05e-3)]:
        close(annealing.coef_at(step), coef, 1e-15)


def test_floor_is_reached_at_step_80_and_kept() -> None:
    annealing = KLCoefficientAnnealing()
    assert annealing.coef_at(79) > 1e-3
    close(annealing.coef_at(80), 1e-3, 1e-15)
    for step in (81, 82, 100, 1000, 10**9):
        assert annealing.coef_at(step) == 1e-3


@given(st.floats(0, 1), st.floats(0, 1), st.floats(1e-6, 1), st.integers(0, 1000))
def test_falls_from_start_to_floor(a: float, b: float, decrement: float, step: int) -> None:
    start, floor = max(a, b), min(a, b)
    annealing = KLCoefficientAnnealing(start, floor, decrement)
    assert annealing.coef_at(0) == start
    assert floor <= annealing.coef_at(step + 1) <= annealing.coef_at(step) <= start
    if annealing.coef_at(step + 1) > floor:
        close(annealing.coef_at(step) - annealing.coef_at(step + 1), decrement)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"floor": 6e-3}, r"`floor` must be in \[0, 0\.005\]: got 0\.006\. The coefficient falls"),
        ({"floor": -1e-3}, r"`floor` must be in \[0, 0\.005\]: got -0\.001\."),
        ({"floor": math.nan}, r"`floor` must be .*: got nan\."),
        ({"start": math.nan}, r"`floor` must be in \[0, nan\]: got 0\.001\."),
        ({"start": -1.0}, r"`floor` must be in \[0, -1\]"),
        ({"decrement": 0.0}, r"`decrement` must be above 0 and finite: got 0\.0\."),
        ({"decrement": -5e-5}, r"`decrement` must be above 0 and finite: got -5e-05\."),
        ({"decrement": math.nan}, r"`decrement` must be above 0 and finite: got nan\."),
        ({"decrement": math.inf}, r"`decrement` must be above 0 and finite: got inf\."),
        ({"start": math.inf}, r"`start` must be at least 0: got inf\."),
        ({"unit": "epoch"}, r"`unit` must be rollout or optimizer_step: got epoch\."),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        KLCoefficientAnnealing(**values)


def test_objective_without_coefficient_is_refused_for_fit_only() -> None:
    module = SimpleNamespace(objective=GRPO())
    trainer: Any = SimpleNamespace(callbacks=[])
    message = r"`coefficient` must be one of GRPO's \(.*\): got teacher_kl_coef\."
    with pytest.raises(ConfigurationError, match=message):
        KLCoefficientAnnealing().setup(trainer, module, "fit")
    KLCoefficientAnnealing().setup(trainer, module, "validate")
    for objective in (KDRL(), OnPolicyDistillation()):
        KLCoefficientAnnealing().setup(trainer, SimpleNamespace(objective=objective), "fit")


@pytest.mark.parametrize(("unit", "per_step"), [("optimizer_step", 1), ("rollout", 4)])
def test_coefficient_follows_the_unit(unit: Any, per_step: int) -> None:
    annealing = KLCoefficientAnnealing(unit=unit)
    logged: list[float] = []
    module = SimpleNamespace(
        objective=KDRL(), log_step=lambda values: logged.extend(values.values())
    )
    trainer: Any = SimpleNamespace(
        global_step=0,
        accumulate_grad_batches=1,
        num_training_batches=100,
        datamodule=SimpleNamespace(updates_per_rollout=4),
    )
    annealing.on_train_start(trainer, module)
    assert module.objective.coefficient("teacher_kl_coef") == 5e-3
    for step in range(1, 13):
        used = module.objective.coefficient("teacher_kl_coef")
        annealing.on_train_batch_start(trainer, module, None, step - 1)
        trainer.global_step = step
        annealing.on_train_batch_end(trainer, module, None, None, step - 1)
        assert logged[-1] == used
        assert module.objective.coefficient("teacher_kl_coef") == annealing.coef_at(
            step // per_step
        )


def test_resumed_run_starts_where_it_stopped() -> None:
    module = SimpleNamespace(objective=KDRL())
    trainer: Any = SimpleNamespace(global_step=60)
    KLCoefficientAnnealing(unit="optimizer_step").on_train_start(trainer, module)
    close(module.objective.coefficient("teacher_kl_coef"), 2e-3, 1e-15)
