"""Measures where a teacher helps: the verifier's errors crossed with the teacher's, by method.

A regime is a verifier and a teacher. The verifier's error is a fixed function of prompt and
completion, another one for each seed; accuracy is always the true one. The search is equal for all
methods: each learning rate in two regimes on the first seed, then the better one everywhere; other
settings are those of the configurations. A method that has no teacher is run once for all teachers,
one that does not learn from verdicts once for all verifiers.

The runs are ordered by importance, and each is written when it ends; the same command continues a
run that was stopped. Writes ``regimes.json``, ``regimes.png``, ``regimes_why.png`` and the tables
in ``regimes.md`` into --out. ``--task residues`` is a second, smaller task without a search: it
takes the rates that the first has chosen.

    python benchmarks/regimes.py --out docs/comparison
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.regime_cases.methods import EVERY_METHOD  # noqa: E402
from benchmarks.regime_cases.tasks import TASKS, Regime, Task  # noqa: E402

ROLLOUTS = 30
RATES = (3e-4, 6e-4)
STATISTICS = (
    "kd/dead_frac_pos",
    "kd/dead_frac_neg",
    "kd/imitation_frac",
    "kd/strong_conflict_frac",
    "kd/reverse_kl_correct",
    "kd/reverse_kl_wrong",
    "kd/offset_weight_p99",
    "kd/offset_weight_max",
    "kd/offset_clamp_frac",
    "policy/grad_norm",
)


class Job(NamedTuple):
    """One run."""

    method: str
    verifier: str
    teacher: str
    lr: float
    seed: int


def job(task: Task, method: str, regime: Regime, rate: float, seed: int) -> Job:
    """Return the run of a cell; cells that cannot differ share one."""
    how, first = EVERY_METHOD[method], task.regimes[0]
    verifier = regime.verifier if how.verdicts else first.verifier
    return Job(method, verifier, regime.teacher if how.teacher else first.teacher, rate, seed)


def run(config: list[str], updates: int, rate: float, seed: int, described: bool) -> dict[str, Any]:
    """Train without pictures and pages, and return the true accuracy at the end.

    Args:
        config: the configuration and the flags.
        updates: optimizer steps per rollout.
        rate: learning rate at the start.
        seed: seed of the run.
        described: also return the statistics of imitation, a value per rollout.
    """
    import torch
    from lightning.pytorch.callbacks import Callback

    from benchmarks.methods import built
    from kdrl_lightning.callbacks import (
        RolloutProgress,
        RunReport,
        SamplePage,
        SelectiveImitationStats,
        WeightSyncCheck,
    )

    torch.set_num_threads(1)
    cli = built(
        [*config, "--trainer.num_sanity_val_steps=0"], ROLLOUTS, rate, seed, updates, ROLLOUTS
    )
    rows: list[dict[str, float]] = []

    class Afterwards(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            for callback in trainer.callbacks:
                if isinstance(callback, SelectiveImitationStats):
                    rows.extend(callback.rows)
                    callback.rows = []  # without rows it draws no picture

    left_out = [RunReport, SamplePage, RolloutProgress, WeightSyncCheck]
    left_out += [] if described else [SelectiveImitationStats]
    kept = [c for c in cli.trainer.callbacks if not isinstance(c, tuple(left_out))]
    cli.trainer.callbacks = [*kept, Afterwards()]
    started = time.perf_counter()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    result = {
        "greedy": round(float(cli.trainer.callback_metrics["val/accuracy"]), 4),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if rows:
        result["statistics"] = {
            name: [rounded(row.get(name)) for row in rows]
            for name in STATISTICS
            if any(name in row for row in rows)
        }
    return result


def rounded(value: float | None) -> float | None:
    """Return three decimals; None for NaN, the mean of no tokens, which JSON cannot hold."""
    return round(value, 3) if value is not None and math.isfinite(value) else None


class Campaign:
    """Runs jobs of a task once, and writes each result to a file.

    Attributes:
        results: every finished run, with its job's fields.
        sizes: what all runs share.
        rates: the learning rate of each method, chosen by the first search that was complete.
    """

    def __init__(self, task: Task, file: Path, minutes: float, sizes: dict[str, Any]) -> None:
        self.task = task
        self.file = file
        self.until = time.monotonic() + 60 * minutes
        self.sizes = sizes
        stored = json.loads(file.read_text()) if file.exists() else {}
        self.rates: dict[str, float] = stored.get("chosen", {})
        self.results: dict[Job, dict[str, Any]] = {
            Job(*(r[name] for name in Job._fields)): r for r in stored.get("results", [])
        }

    def run(self, jobs: Sequence[Job]) -> bool:
        """Run the jobs that have no result yet; return False if the time ran out before the end."""
        left = [one for one in dict.fromkeys(jobs) if one not in self.results]
        for done, one in enumerate(left, 1):
            if time.monotonic() > self.until:
                return False
            how = EVERY_METHOD[one.method]
            flags = self.task.flags(how, one.verifier, one.teacher, one.seed)
            result = run(flags, how.updates, one.lr, one.seed, described=one.seed == 0)
            self.results[one] = {**one._asdict(), **result}
            self._write()
            print(
                f"[{done}/{len(left)}] {', '.join(map(str, one))}: {result['greedy']:.3f} "
                f"({result['seconds']:.0f} s)",
                flush=True,
            )
        return True

    def _write(self) -> None:
        lines = ",\n".join(json.dumps(r) for r in self.results.values())
        head = f'"settings": {json.dumps(self.sizes)},\n"chosen": {json.dumps(self.rates)}'
        text = f'{{{head},\n"results": [\n{lines}\n]}}\n'
        part = self.file.with_suffix(".part")
        part.write_text(text)
        part.replace(self.file)


def best_rates(task: Task, results: dict[Job, dict[str, Any]], seed: int) -> dict[str, float]:
    """Return each method's rate with the best mean greedy accuracy in the searched regimes."""

    def mean(method: str, rate: float) -> float:
        jobs = [job(task, method, regime, rate, seed) for regime in task.searched]
        found = [results[one]["greedy"] for one in jobs if one in results]
        return statistics.mean(found) if found else 0.0  # the search was stopped early

    best = {m: max(RATES, key=lambda rate: mean(m, rate)) for m in task.methods}
    like = {m: EVERY_METHOD[m].rate_of for m in (*task.variants, *task.ablation)}
    return best | {method: best[other] for method, other in like.items() if other}


def stages(task: Task, rates: dict[str, float], seeds: Sequence[int]) -> Iterator[list[Job]]:
    """Yield the runs after the search, the most important first."""
    rest = [regime for regime in task.regimes if regime not in task.core]
    main, variants = task.methods, [*task.variants, *task.ablation]
    for methods, regimes, some in (
        (main, task.core, seeds[:1]),
        (task.ablation, task.core, seeds[:1]),
        (main, rest, seeds[:1]),
        (main, task.core, seeds[1:2]),
        (task.variants, task.core, seeds[:1]),
        (main, task.core, seeds[2:3]),
        (variants, task.core, seeds[1:3]),
        (main, task.core, seeds[3:]),
        (variants, task.core, seeds[3:]),
        (main, rest, seeds[1:]),
        (variants, rest, seeds),
    ):
        yield [job(task, m, r, rates[m], seed) for seed in some for r in regimes for m in methods]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and pictures")
    parser.add_argument("--task", choices=TASKS, default="regimes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after")
    parser.add_argument("--report", action="store_true", help="only write tables and pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    task, first = TASKS[args.task], args.seeds[0]
    sizes = {"rollouts": ROLLOUTS, "rates": RATES, "seeds": args.seeds}
    campaign = Campaign(task, args.out / f"{args.task}.json", args.minutes, sizes)
    methods = task.methods
    searched = [
        job(task, m, r, rate, first) for r in task.searched for m in methods for rate in RATES
    ]
    of = campaign if searched else Campaign(TASKS["regimes"], args.out / "regimes.json", 0, sizes)
    enough = args.report or bool(of.rates) or campaign.run(searched)
    rates = of.rates or best_rates(of.task, of.results, first)
    if enough and not args.report:
        of.rates = rates
    for stage in [] if args.report or not enough else stages(task, rates, args.seeds):
        if not campaign.run(stage):
            break
    from benchmarks.regime_cases.report import Cells, write

    write(args.out, args.task, Cells(task, list(campaign.results.values()), rates), first)


if __name__ == "__main__":
    main()
