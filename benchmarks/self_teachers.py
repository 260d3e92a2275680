"""Compares a self-teacher that sees the solution with an external teacher and with none.

All runs of a task have the same number of student forward passes. A pass is one completion that
goes once through the student's current weights: in an update (with its backward pass), or when it
is scored for a later update. Sampling does not count, nor does the teacher, which is counted apart:
a self-teacher costs a pass of the student's size, an external one a pass of its size. The learning
rate falls with the passes that are used, and a run ends with the rollout that reaches the budget.

The search is equal for all: both learning rates on the first seed, then the better one on all
seeds. Costs are those of one rollout of each method: floating-point operations executed, sampling
included, and CPU seconds of the whole run per optimizer step. The leakage runs provoke a failure on
purpose: their teacher begins with "==" after a solution, and ``TeacherHealth`` must notice when the
student does. Runs are written when they end; the same command continues.

    python benchmarks/self_teachers.py --out docs/comparison
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.self_cases.arms import ARMS, EVERY_ARM, HEALTH, LEAKS, TASKS  # noqa: E402

# `Any`: results as JSON holds them; Lightning's arguments.
ROLLOUTS = 30
BUDGET = ROLLOUTS * 384  # of GRPO with two updates: 256 in updates, 128 scored for the second
RATES = (3e-4, 6e-4)
EVERY = 5  # rollouts between two validations
COMPARED = ("addition", "residues")


class Job(NamedTuple):
    """One run; a rate of 0 counts the operations of one rollout."""

    arm: str
    task: str
    lr: float
    seed: int


def run(job: Job, budget: int) -> dict[str, Any]:
    """Train until the budget is used, and return accuracies, passes, warnings and costs."""
    import torch
    from lightning.pytorch.callbacks import Callback
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.methods import built
    from kdrl_lightning.callbacks import (
        RolloutProgress,
        RunReport,
        SamplePage,
        SelectiveImitationStats,
        WeightSyncCheck,
    )
    from kdrl_lightning.callbacks.teacher_health import TeacherHealth
    from kdrl_lightning.cli.main import KDRLCLI

    torch.set_num_threads(1)
    costs = not job.lr
    command = [*EVERY_ARM[job.arm].command(TASKS[job.task]), "--trainer.num_sanity_val_steps=0"]
    if job.arm in LEAKS:
        command.append(f"--trainer.callbacks+={json.dumps(HEALTH)}")
    updates = KDRLCLI.run(command, instantiate_only=True).datamodule.updates_per_rollout
    # More rollouts than any budget needs: the passes end the run, and set the rate.
    most = 1 if costs else 4 * ROLLOUTS
    constant = "--model.lr_scheduler.init_args.end_factor=1.0"
    cli = built([*command, constant], most, job.lr or RATES[0], job.seed, updates, EVERY)
    passes = Passes(budget, job.lr or RATES[0], updates)
    left_out = (RunReport, SamplePage, RolloutProgress, WeightSyncCheck, SelectiveImitationStats)
    kept = [c for c in cli.trainer.callbacks if not isinstance(c, left_out)]

    class Count(Callback):
        """Hands the hooks of Lightning to ``Passes``."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            passes.watch(pl_module)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
            passes.set_rate(trainer.optimizers[0])

        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            trainer.should_stop |= passes.ended(trainer.global_step)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            passes.curve.append([passes.student, float(trainer.callback_metrics["val/accuracy"])])

    cli.trainer.callbacks = [*kept, Count()]
    cli.model.prepare_data()  # makes models on first use, which is not a cost of the run
    started, meter = time.process_time(), FlopCounterMode(display=False)
    if costs:
        cli.trainer.limit_val_batches = 0
        with meter:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        return {
            **passes.counts,
            "steps": updates,
            "flops": meter.get_total_flops(),
            "sampled": cli.datamodule.watch.completions,
        }
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = time.process_time() - started
    data, health = cli.datamodule, [c for c in kept if isinstance(c, TeacherHealth)]
    return {
        "greedy": passes.curve[-1][1],
        "curve": passes.curve,
        **passes.counts,
        "steps": cli.trainer.global_step,
        "rollouts": cli.trainer.global_step // updates,
        "sampled": data.watch.completions,
        "cpu_seconds": round(seconds, 1),
        **({} if not health else leaked(health[0])),
    }


def leaked(health: Any) -> dict[str, Any]:
    """Return which share of completions cites the solution, by rollout, and the warnings."""
    return {
        "leak_frac": [round(row["health/leak_frac"], 3) for row in health.rows],
        "warnings": health.events,
    }


class Passes:
    """Counts forward passes of completions, and ends a run when the budget is used.

    Args:
        budget: student passes of the run.
        rate: learning rate at the start.
        updates: per rollout.

    Attributes:
        student: passes of the current student's weights, with and without gradient.
        teacher: completions that the teacher has read; in every update, if it runs there.
        curve: (student passes, greedy accuracy) of each validation.
    """

    def __init__(self, budget: int, rate: float, updates: int) -> None:
        self.budget, self.rate, self.updates = budget, rate, updates
        self.student = self.teacher = 0
        self.curve: list[list[float]] = []

    @property
    def counts(self) -> dict[str, int]:
        """Passes of the student and of the teacher, by name."""
        return {"student_passes": self.student, "teacher_passes": self.teacher}

    def watch(self, module: Any) -> None:
        """Count from now on."""

        def add(scorer: Any, args: tuple[Any, ...], _: Any) -> None:
            self.student += len(args[0])

        module.student.register_forward_pre_hook(add, with_kwargs=True)
        if module.teacher is None:
            return
        for name in ("score", "states"):
            setattr(module.teacher, name, self._counted(getattr(module.teacher, name)))

    def _counted(self, method: Any) -> Any:
        def counted(batch: Any, *rest: Any) -> Any:
            self.teacher += len(batch.input_ids)
            return method(batch, *rest)

        return counted

    def set_rate(self, optimizer: Any) -> None:
        """Let the rate fall with the passes that are used."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate * max(1.0 - self.student / self.budget, 0.0)

    def ended(self, step: int) -> bool:
        """Return whether a rollout has just ended with the budget used."""
        return self.student >= self.budget and step % self.updates == 0


class Campaign:
    """Runs jobs once, and writes each result to a file.

    Attributes:
        results: every finished run, with its job's fields.
    """

    def __init__(self, file: Path, minutes: float, budget: int) -> None:
        self.file, self.budget = file, budget
        self.until = time.monotonic() + 60 * minutes
        stored = json.loads(file.read_text()) if file.exists() else {}
        if stored and stored["settings"] != self.settings:
            raise SystemExit(f"{file} has other settings: {stored['settings']}. Move it away.")
        self.results: dict[Job, dict[str, Any]] = {
            Job(*(r[name] for name in Job._fields)): r for r in stored.get("results", [])
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What all runs share."""
        return {"student_passes": self.budget, "rates": list(RATES)}

    def run(self, jobs: Sequence[Job]) -> bool:
        """Run the jobs that have no result yet; return False if the time ran out before the end."""
        left = [one for one in dict.fromkeys(jobs) if one not in self.results]
        for done, one in enumerate(left, 1):
            if time.monotonic() > self.until:
                return False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = run(one, self.budget)
            self.results[one] = {**one._asdict(), **result}
            self._write()
            told = {k: result[k] for k in ("greedy", "cpu_seconds", "flops") if k in result}
            print(f"[{done}/{len(left)}] {', '.join(map(str, one))}: {told}", flush=True)
        return True

    def _write(self) -> None:
        lines = ",\n".join(json.dumps(r) for r in self.results.values())
        part = self.file.with_suffix(".part")
        part.write_text(f'{{"settings": {json.dumps(self.settings)},\n"results": [\n{lines}\n]}}\n')
        part.replace(self.file)


def best_rates(results: dict[Job, dict[str, Any]], task: str, seed: int) -> dict[str, float]:
    """Return each method's rate with the best mean accuracy over the first seed's curve."""

    def mean(arm: str, rate: float) -> float:
        found = results.get(Job(arm, task, rate, seed))
        return statistics.fmean(value for _, value in found["curve"]) if found else 0.0

    return {arm: max(RATES, key=lambda rate: mean(arm, rate)) for arm in ARMS}


def stages(campaign: Campaign, tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[list[Job]]:
    """Yield the runs, the most important first; rates follow from those before."""
    first = seeds[0]
    for task in tasks:
        yield [Job(arm, task, rate, first) for arm in ARMS for rate in RATES]
        if task == tasks[0]:
            yield [Job(arm, "citing", RATES[1], first) for arm in LEAKS]
            yield [Job(arm, task, 0.0, first) for arm in ARMS]
        rates = best_rates(campaign.results, task, first)
        yield [Job(arm, task, rates[arm], seed) for seed in seeds[1:] for arm in ARMS]
    yield [Job(arm, "citing", RATES[1], seed) for seed in seeds[1:] for arm in LEAKS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--budget", type=int, default=BUDGET, help="student passes of a run")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after")
    parser.add_argument("--report", action="store_true", help="only write tables and pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(args.out / "self_teachers.json", args.minutes, args.budget)
    for stage in [] if args.report else stages(campaign, args.tasks, args.seeds):
        if not campaign.run(stage):
            break
    from benchmarks.self_cases.report import write

    rates = {task: best_rates(campaign.results, task, args.seeds[0]) for task in COMPARED}
    write(args.out, list(campaign.results.values()), rates)


if __name__ == "__main__":
    main()
