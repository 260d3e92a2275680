"""Plans every recipe and the hardware overlays, and writes the tables of docs/plan/README.md.

Recipes that differ only in their loss share a plan. Nothing needs a network, weights or a GPU.

    python benchmarks/recipes.py --out docs/plan
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from kdrl_lightning.cli.plan import PlanCLI, job_of, module_of, own_flags, within_context
from kdrl_lightning.hardware.planning.cards import bytes_of, card_named
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.models import local_teachers
from kdrl_lightning.hardware.planning.planner import Plan, plan
from kdrl_lightning.hardware.planning.report import gb
from kdrl_lightning.models.loading import model_path
from kdrl_lightning.module import KDRLModule

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "recipes"
PARTS = {"base", "base.yaml", "teacher.yaml", "math.yaml"}
CARD = "H100"
# A student and its teacher as on docs/getting_started.md.
FIRST_RUN = [
    "--config=configs/kdrl.yaml",
    "--model.student=Qwen/Qwen3-0.6B",
    "--model.teacher.model=Qwen/Qwen3-4B",
    "--data.rollout.max_tokens=1024",
    "--data.rollout.minibatches_per_rollout=1",
    "--trainer.accumulate_grad_batches=32",
]
SHARDED = [
    "--config=configs/kdrl.yaml",
    "--model.student=Qwen/Qwen3-8B",
    "--model.teacher.model=Qwen/Qwen3-32B",
    "--data.rollout.prompts_per_rollout=128",
    "--data.rollout.max_tokens=8192",
    "--data.rollout.minibatches_per_rollout=1",
    "--trainer.accumulate_grad_batches=64",
]
OVERLAYS = {
    "gpu1": FIRST_RUN,
    "gpu1_vllm": FIRST_RUN,
    "node8": SHARDED,
    "node8_vllm": SHARDED,
    "node8_server": SHARDED,
}


def recipes() -> dict[str, list[str]]:
    """Return the flags of every recipe that runs, by its name."""
    files = (p for p in sorted(FOLDER.rglob("*.yaml")) if not {p.parent.name, p.name} & PARTS)
    return {str(p.relative_to(FOLDER).with_suffix("")): [f"--config={p}"] for p in files}


def parsed(flags: list[str]) -> tuple[Job, KDRLModule, float]:
    """Return job, module and number of rollouts of a command line."""
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    cli = PlanCLI.run([*flags, "--trainer.callbacks=[]"], instantiate_only=True)
    own, _ = own_flags().parse_known_args([])
    job, module = job_of(cli.config, own), module_of(cli)
    updates = job.rollout.minibatches_per_rollout * job.rollout.epochs_per_rollout
    return within_context(job, module), module, max(0, cli.config.trainer.max_steps) / updates


def key_of(job: Job, module: KDRLModule) -> str:
    """Return a text that two runs with the same plan share."""
    teachers = [(model_path(t.model), t.dtype, t.offload) for t in local_teachers(module.teacher)]
    objective = module.objective
    top_k = objective.top_k or objective.teacher_top_k
    kind = objective.needs_reference, top_k, objective.divergence is not None
    return str((job, module.student_source, teachers, kind, module.activation_checkpointing))


def row(name: str, job: Job, made: Plan, rollouts: float) -> dict[str, Any]:
    """Return what the tables show of a plan."""
    return {
        "name": name,
        "ranks": job.ranks,
        "rollouts": rollouts,
        "accumulate": job.accumulate,
        **made.as_dict(),
        "worst": made.worst.name,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return plans as a Markdown table."""
    phases = ("sample", "score", "update", "step", "push")
    lines = [
        f"| run | {' | '.join(phases)} | verdict on 80 GB | tokens of a micro-batch: set, most "
        f"that fit | checkpoint GB | s a rollout on {CARD} |",
        "| --- " * 10 + "|",
    ]
    for one in rows:
        sizes = [gb(one["phases"][name]["sum"]) for name in phases]
        verdict = "fits" if one["fits"] else f"{one['breaks']} does not fit"
        if one["cures"]:
            verdict += f"; `{' '.join(one['cures'])}`"
        most = one["max_tokens_per_micro_batch"]
        seconds = one["seconds_per_rollout"].get(CARD, {}).get("sum", 0.0)
        lines.append(
            f"| `{one['name']}` | {' | '.join(sizes)} | {verdict} "
            f"| {one['micro_batch_tokens']:,}, {most or 0:,} | {gb(one['checkpoint_bytes'])} "
            f"| {seconds:,.0f} |"
        )
    return "\n".join(lines)


def cost(one: dict[str, Any]) -> str:
    """Return the planned cost of a run as a cell of the recipes' table."""
    seconds = one["seconds_per_rollout"].get(CARD, {}).get("sum")
    if seconds is None:
        return "–"
    hours = seconds * one["rollouts"] * one["ranks"] / 3600
    total = f"; {one['rollouts']:,.0f}: {hours:,.0f} GPU hours" if hours else ""
    return f"{seconds:,.0f} s a rollout on {one['ranks']} {CARD}{total}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=None)
    args = parser.parse_args()
    runs = {f"hardware/{n}": [*f, f"--config=hardware/{n}"] for n, f in OVERLAYS.items()}
    runs |= recipes()
    known: dict[str, Plan] = {}
    rows = []
    for name, flags in runs.items():
        if args.only is not None and name not in args.only:
            continue
        job, module, rollouts = parsed(flags)
        key = key_of(job, module)
        if key not in known:
            cards = (card_named(CARD),) if job.on_gpu else ()
            known[key] = plan(module, job, bytes_of("80GB"), cards)
        rows.append(row(name, job, known[key], rollouts))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    for one in rows:
        print(f"{one['name']}: {cost(one)}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "recipes.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
