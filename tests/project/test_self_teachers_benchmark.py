"""The comparison of self-teachers: its runs, how it counts passes, and what its tables say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.residues.task import ResidueTraces
from benchmarks.self_cases.arms import ARMS, EVERY_ARM, LEAKS, TASKS
from benchmarks.self_cases.models import CITATION, CitingTraces, ShownTraces
from benchmarks.self_cases.report import tables, write
from benchmarks.self_teachers import RATES, Campaign, Job, Passes, best_rates, stages
from kdrl_lightning.tiny import AdditionTraces

SEEDS = [0, 1, 2]


def finished(job: Job) -> dict[str, Any]:
    """Return what a run would: the second rate is better."""
    value = 0.9 if job.lr == RATES[1] else 0.5
    numbers = {"student_passes": 4, "teacher_passes": 2, "steps": 2, "sampled": 4, "flops": 8e9}
    ran = {"greedy": value, "curve": [[4, value]], "rollouts": 1, "cpu_seconds": 1.0}
    health = {"leak_frac": [0.5], "warnings": [[3, "leakage"]]}
    return {**job._asdict(), **numbers, **ran, **health}


def all_runs(tmp_path: Path) -> Campaign:
    campaign = Campaign(tmp_path / "results.json", 0, 4)
    for stage in stages(campaign, ("addition", "residues"), SEEDS):
        campaign.results |= {job: finished(job) for job in stage}
    return campaign


def test_every_method_runs_on_every_task_with_every_seed_at_its_best_rate(tmp_path: Path) -> None:
    known = set(all_runs(tmp_path).results)
    for task in ("addition", "residues"):
        assert {Job(arm, task, RATES[1], seed) for arm in ARMS for seed in SEEDS} <= known
        assert {Job(arm, task, rate, SEEDS[0]) for arm in ARMS for rate in RATES} <= known
    assert {Job(arm, "citing", RATES[1], seed) for arm in LEAKS for seed in SEEDS} <= known
    assert Job("GRPO", "addition", RATES[0], SEEDS[1]) not in known


def test_the_tables_name_every_method_and_the_warnings(tmp_path: Path) -> None:
    results = all_runs(tmp_path).results
    rates = {task: best_rates(results, task, SEEDS[0]) for task in ("addition", "residues")}
    text = tables(list(results.values()), rates)
    assert all(f"| {arm} | 0.0006 | 0.90 (0.90–0.90)" in text for arm in ARMS)
    assert (
        "| OPSD, uncapped, cites | 0.90 (0.90–0.90) | 0.50 (0.50–0.50) | 3 of 3 runs | 3–3 |"
        in text
    )
    assert "| GRPO | 2 | 4 | 2 | 4 | 8.0 | 4.0 |" in text


def test_a_stopped_campaign_continues_and_refuses_another_budget(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    campaign = Campaign(file, 0, 4)
    job = Job("GRPO", "addition", RATES[0], 0)
    campaign.results[job] = finished(job)
    campaign._write()
    assert set(Campaign(file, 0, 4).results) == {job}
    with pytest.raises(SystemExit, match="other settings"):
        Campaign(file, 0, 5)


def test_the_rate_falls_with_the_student_passes_and_the_budget_ends_a_rollout() -> None:
    passes = Passes(budget=8, rate=0.5, updates=2)
    student = nn.Linear(3, 1)
    teacher = SimpleNamespace(score=lambda batch: "scored", states=lambda batch: "states")
    passes.watch(SimpleNamespace(student=student, teacher=teacher))
    student(torch.zeros(6, 3))
    assert teacher.score(SimpleNamespace(input_ids=torch.zeros(5, 3))) == "scored"
    assert passes.counts == {"student_passes": 6, "teacher_passes": 5}
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    passes.set_rate(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5 * (1 - 6 / 8)
    assert not passes.ended(step=2)
    student(torch.zeros(2, 3))
    assert passes.ended(step=2)
    assert not passes.ended(step=3)  # the rollout has another update


def test_readers_copy_what_they_are_shown_and_the_citing_one_says_so() -> None:
    rows = [ShownTraces(ResidueTraces(64, slip=1.0))[i] for i in range(64)]
    shown = [row for row in rows if "#" in row["prompt"]]
    assert len(shown) == 32
    assert all(row["prompt"].startswith(row["completion"] + "#") for row in shown)
    cited = [CitingTraces(AdditionTraces(64, shown=0.5))[i] for i in range(64)]
    assert {("#" in row["prompt"]) == row["completion"].startswith(CITATION) for row in cited} == {
        True
    }


@pytest.mark.parametrize("arm", EVERY_ARM)
def test_commands_name_a_configuration_that_exists(arm: str) -> None:
    command = EVERY_ARM[arm].command(TASKS["addition"])
    assert Path(command[0].removeprefix("--config=")).exists()


def test_the_page_says_how_it_was_measured_and_keeps_what_is_written_around_the_tables(
    tmp_path: Path,
) -> None:
    results = all_runs(tmp_path).results
    rates = {task: best_rates(results, task, SEEDS[0]) for task in ("addition", "residues")}
    write(tmp_path, list(results.values()), rates)
    page = tmp_path / "self_teachers.md"
    assert "**student passes**" in page.read_text() and (tmp_path / "self_teachers.png").exists()
    page.write_text(page.read_text() + "What does not help.\n")
    write(tmp_path, list(results.values()), rates)
    assert page.read_text().endswith("What does not help.\n")
    assert page.read_text().count("| GRPO | 0.0006 |") == 2
