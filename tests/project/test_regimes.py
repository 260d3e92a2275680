"""The cross of verifiers and teachers: which runs it makes, and what its tables say of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.regime_cases.methods import EVERY_METHOD
from benchmarks.regime_cases.report import Cells, tables
from benchmarks.regime_cases.tasks import ADDITION, TASKS, Regime
from benchmarks.regimes import RATES, Job, best_rates, job, stages

SEEDS = [0, 1, 2, 3, 4]
RATE = {name: RATES[0] for name in EVERY_METHOD}


def cells_of(accuracy: dict[tuple[str, Regime], list[float]]) -> Cells:
    runs: list[dict[str, Any]] = []
    for (method, regime), values in accuracy.items():
        for seed, value in enumerate(values):
            runs.append(
                {**job(ADDITION, method, regime, RATES[0], seed)._asdict(), "greedy": value}
            )
    return Cells(ADDITION, runs, RATE)


@pytest.mark.parametrize("name", TASKS)
def test_in_the_end_every_method_has_run_in_every_regime_with_every_seed(name: str) -> None:
    task = TASKS[name]
    every = [*task.methods, *task.variants, *task.ablation]
    expected = {job(task, m, r, RATES[0], s) for m in every for r in task.regimes for s in SEEDS}
    assert {one for stage in stages(task, RATE, SEEDS) for one in stage} == expected
    assert set(task.core) <= set(task.regimes)


def test_what_a_method_does_not_read_does_not_make_another_run() -> None:
    def cells(method: str) -> int:
        return len({job(ADDITION, method, regime, 3e-4, 0) for regime in ADDITION.regimes})

    assert (cells("GRPO"), cells("on-policy distillation"), cells("KDRL")) == (5, 3, 15)


def test_the_rate_is_the_one_with_the_best_mean_of_the_searched_regimes() -> None:
    results: dict[Job, dict[str, Any]] = {}
    for method in ADDITION.methods:
        for rate, pair in zip(RATES, ((0.9, 0.2), (0.6, 0.6)), strict=True):
            for regime, value in zip(ADDITION.searched, pair, strict=True):
                results[job(ADDITION, method, regime, rate, 0)] = {"greedy": value}
    # GRPO's cells are those of the two verifiers, distillation's those of the two teachers.
    assert set(best_rates(ADDITION, results, 0).values()) == {RATES[1]}
    assert set(best_rates(ADDITION, results, 0)) == set(EVERY_METHOD)


def test_a_verifier_errs_by_the_run_s_seed_and_validation_never() -> None:
    how = EVERY_METHOD["RLAD α 0.5"]
    flags = ADDITION.flags(how, "both 30 %", "forgets half", 3)
    (reward,) = [flag for flag in flags if flag.startswith("--data.reward=")]
    assert '"accepts_wrong": 0.3, "rejects_right": 0.3, "seed": 3}' in reward
    assert reward.endswith('"validation": "kdrl_lightning.tiny.addition_reward"}}}')
    assert any(flag.endswith(".slip=0.5") for flag in flags)
    assert not any(".slip" in f for f in ADDITION.flags(EVERY_METHOD["GRPO"], "exact", "good", 0))


def test_the_worst_regime_is_among_those_that_all_methods_have() -> None:
    first, second, third = ADDITION.regimes[0], ADDITION.regimes[1], ADDITION.regimes[6]
    accuracy = {(m, r): [0.9, 0.7] for m in ADDITION.methods for r in (first, second)}
    accuracy["KDRL", second] = [0.2, 0.4]
    accuracy["KDRL", third] = [0.0]  # no other method has run there
    cells = cells_of(accuracy)
    assert cells.shared == [first, second]
    worst = cells.worst("KDRL")
    assert worst is not None and worst[0] == second and worst[1] == pytest.approx(0.3)
    assert cells.worst("RLAD α 0.3") is None
    text = tables(cells)
    assert "| KDRL | 0.0003 | accepts 30 % of wrong, good | 0.30 (0.20–0.40) ×2 | 0.55 |" in text
    assert "| KDRL | 0.80 (0.70–0.90) ×2 | 0.30 (0.20–0.40) ×2 | – | – | – |" in text
