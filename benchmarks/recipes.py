"""Plans every recipe and the hardware overlays, and writes docs/plan/recipes.md.

It also writes the cost of each recipe into its header and into configs/recipes/README.md. Recipes
that differ only in their loss share a plan. Nothing needs a network, weights or a GPU.

    python benchmarks/recipes.py --out docs/plan
    python benchmarks/recipes.py --out docs/plan --only kdrl hardware/node8    # plan these again
    python benchmarks/recipes.py --out docs/plan --only                        # write the texts
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import re
import shutil
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.cli.plan import PlanCLI, job_of, module_of, plan_flags, within_context
from kdrl_lightning.hardware.planning.cards import bytes_of, card_named
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.planner import Plan, plan
from kdrl_lightning.hardware.planning.report import gb
from kdrl_lightning.hardware.planning.shapes import shipped
from kdrl_lightning.hardware.planning.teachers.own_prompts import own_prompts_of, tokens_per_token
from kdrl_lightning.hardware.planning.teachers.stand_ins import local_teachers
from kdrl_lightning.models.loading import model_path
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.teachers.self_teachers import self_teachers

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "recipes"
PARTS = {"base", "base.yaml", "teacher.yaml", "zebra.yaml", "countdown.yaml", "math.yaml"}
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
    "--model.objective.init_args.ref_kl_coef=0.01",
]
OVERLAYS = {
    "gpu1": FIRST_RUN,
    "gpu1_vllm": FIRST_RUN,
    "node8": SHARDED,
    "node8_vllm": SHARDED,
    "node8_server": SHARDED,
}
# Shapes of the teachers that other benchmarks train.
TRAINED: dict[str, dict[str, Any]] = {
    "runs/smollm2/teacher": shipped()["HuggingFaceTB/SmolLM2-135M-Instruct"],
    "runs/smollm2/cross_teacher": {
        "model_type": "llama",
        "vocab_size": 600,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    },
}
# Overlays of the replication's other tasks, planned for one method.
TASKS = ("zebra", "countdown", "math")
# Settings on which no plan depends.
UNREAD = {
    "trainer": ("logger", "callbacks"),
    "data": ("train_prompts", "val_prompts", "test_prompts"),
}
HEADER = "# Planned cost (calculated, not measured): "
MEMORY = "80GB"
# Smallest share of a GPU's memory that an overlay must leave free.
MARGIN = 0.05


def recipes() -> dict[str, list[str]]:
    """Return the flags of every recipe that runs, by its name."""
    files = (p for p in sorted(FOLDER.rglob("*.yaml")) if not {p.parent.name, p.name} & PARTS)
    return {str(p.relative_to(FOLDER).with_suffix("")): [f"--config={p}"] for p in files}


def parsed(flags: list[str]) -> tuple[Job, KDRLModule, float]:
    """Return job, module and number of rollouts of a command line."""
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    cli = PlanCLI.run([*flags, "--trainer.callbacks=[]"], instantiate_only=True)
    flags, _ = plan_flags().parse_known_args(trained_shapes())
    job, module = job_of(cli.config, flags), module_of(cli)
    updates = job.rollout.minibatches_per_rollout * job.rollout.epochs_per_rollout
    return within_context(job, module), module, max(0, cli.config.trainer.max_steps) / updates


@cache
def trained_shapes() -> list[str]:
    """Return flags that name the configurations of ``TRAINED``, written to new files."""
    folder, words = Path(tempfile.mkdtemp()), []
    atexit.register(shutil.rmtree, folder)
    for place, (name, values) in enumerate(TRAINED.items()):
        file = folder / f"{place}.json"
        file.write_text(json.dumps(values))
        words += ["--model-config", f"{name}={file}"]
    return words


def key_of(job: Job, module: KDRLModule) -> str:
    """Return a key that is equal for runs with the same plan."""
    teachers = [(model_path(t.model), t.dtype, t.offload) for t in local_teachers(module.teacher)]
    rules = [(type(t.rule).__name__, t.rule.live_share) for t in self_teachers(module.teacher)]
    objective = module.objective
    top_k = objective.top_k or objective.teacher_top_k
    divergence, coupled = objective.divergence is not None, objective.couples_tokens
    share = tokens_per_token(module, job)
    read = share, own_prompts_of(module, job, share[0])
    of_student = module.student_source, module.activation_checkpointing, module.lora
    kind = objective.needs_reference, top_k, divergence, coupled
    return str((job, of_student, teachers, rules, read, kind))


def runs() -> dict[str, list[str]]:
    """Return the flags of every run of the table, by its name."""
    made = {f"hardware/{n}": [*f, f"--config=hardware/{n}"] for n, f in OVERLAYS.items()}
    made |= recipes()
    kdrl = FOLDER / "replication" / "kdrl.yaml"
    for task in TASKS:
        files = [kdrl, kdrl.with_name(f"{task}.yaml")]
        made[f"replication/kdrl + {task}"] = [f"--config={file}" for file in files]
    return made


def digest(flags: list[str]) -> str:
    """Return a digest of all settings of a run on which its plan can depend."""
    parts: list[Any] = []
    for flag in flags:
        name, _, value = flag.partition("=")
        if name != "--config":
            parts.append(flag)
            continue
        places = Path(value), ROOT / value, ROOT / f"configs/{value}.yaml"
        path = next(place for place in places if place.is_file())
        values = load_with_base(path.read_text(), str(path))
        for room, names in UNREAD.items():
            for unread in names:
                values.get(room, {}).pop(unread, None)
        values.pop("report", None)
        parts.append(values)
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row(name: str, flags: list[str], job: Job, made: Plan, rollouts: float) -> dict[str, Any]:
    """Return the record of a plan, from which the pages and headers are written."""
    seconds = made.seconds[CARD].total if CARD in made.seconds else None
    assert made.memory is not None
    return {
        "name": name,
        "digest": digest(flags),
        "planned_on": time.strftime("%Y-%m-%d"),
        "ranks": job.ranks,
        "on_gpu": job.on_gpu,
        "rollouts": rollouts,
        "accumulate": job.accumulate,
        "usable_bytes": made.memory,
        "phases": {phase.name: phase.total for phase in made.phases},
        "worst": made.worst.name,
        "fits": made.fits,
        "cures": made.cures,
        "micro_batch_tokens": made.tokens,
        "most_tokens": made.largest,
        "checkpoint_bytes": made.checkpoint,
        "seconds_per_rollout": seconds,
        "notes": made.notes,
    }


def gpu_hours(one: dict[str, Any]) -> float | None:
    """Return seconds per rollout times rollouts times GPUs, in hours."""
    if one["seconds_per_rollout"] is None:
        return None
    return float(one["seconds_per_rollout"] * one["rollouts"] * one["ranks"] / 3600)


def cost(one: dict[str, Any]) -> str:
    """Return the planned cost of a run in words."""
    hours = gpu_hours(one)
    if hours is None:
        return f"{gb(one['phases'][one['worst']])} GB on a CPU"
    room = "" if one["fits"] else f"; does not fit 80 GB without `{' '.join(one['cures'])}`"
    return (
        f"{one['seconds_per_rollout']:,.0f} s a rollout on {one['ranks']} {CARD}; "
        f"{one['rollouts']:,.0f} rollouts: {rounded(hours)} GPU hours{room}"
    )


def rounded(hours: float) -> str:
    """Return hours with one decimal below 10, so that a short run does not cost 0.

    >>> rounded(0.44), rounded(26128.4)
    ('0.4', '26,128')
    """
    return f"{hours:,.1f}" if hours < 10 else f"{hours:,.0f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return plans as a Markdown table."""
    lines = [
        "| run | GPUs | peak GB per GPU, in | verdict | tokens of a micro-batch: set, most that "
        f"fit | checkpoint GB | s a rollout on {CARD} | rollouts | GPU hours |",
        "| --- " * 9 + "|",
    ]
    for one in rows:
        peak, seconds, hours = (
            one["phases"][one["worst"]],
            one["seconds_per_rollout"],
            gpu_hours(one),
        )
        verdict = f"fits, {1 - peak / one['usable_bytes']:.0%} free"
        if not one["fits"]:
            verdict = f"does not fit; {'`' + ' '.join(one['cures']) + '`' if one['cures'] else ''}"
        card = f"{one['ranks']} × 80 GB" if one["on_gpu"] else "CPU"
        lines.append(
            f"| `{one['name']}` | {card} | {gb(peak)}, {one['worst']} | {verdict.strip('; ')} "
            f"| {one['micro_batch_tokens']:,}, {one['most_tokens'] or 0:,} "
            f"| {gb(one['checkpoint_bytes'])} | {'–' if seconds is None else f'{seconds:,.0f}'} "
            f"| {one['rollouts']:,.0f} | {'–' if hours is None else rounded(hours)} |"
        )
    return "\n".join(lines)


PAGE = """# Every recipe, planned

`python benchmarks/recipes.py --out docs/plan` writes this page with [plan](README.md). All of it
is calculated; nothing here is measured. Memory is that of the phase that needs most on one GPU; of
a card of 80 GB, {usable} GB are usable. Seconds leave out weight pushes, rewards and communication;
expect half or twice as much. GPU hours are seconds per rollout × rollouts × GPUs, without
validation.

The overlays of `configs/hardware/` are planned with Qwen3-0.6B and Qwen3-4B as teacher (one GPU,
256 completions of 1,024 tokens), and with Qwen3-8B, Qwen3-32B as teacher and a reference KL (8
GPUs, 1,024 completions of 8,192 tokens). `rollouts` is `max_steps` of the configuration, in
rollouts; an overlay does not set it, so the figure is that of the method it is planned with.

{table}

What the plans assume of teachers that read other prompts or other tokens than the student:

{notes}
"""


def page(rows: list[dict[str, Any]]) -> str:
    """Return docs/plan/recipes.md."""
    usable = gb(next(one["usable_bytes"] for one in rows if one["on_gpu"]))
    said: dict[str, list[str]] = {}
    for one in rows:
        for note in one["notes"]:
            if "teacher" in note:
                said.setdefault(note, []).append(f"`{one['name']}`")
    notes = "\n".join(f"- {', '.join(names)}: {note}." for note, names in said.items())
    return PAGE.format(usable=usable, table=table(rows), notes=notes)


def with_cost(text: str, one: dict[str, Any]) -> str:
    """Return a recipe's YAML with its planned cost as the last line of its header."""
    lines = [line for line in text.splitlines() if not line.startswith(HEADER)]
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join([*lines[:end], f"{HEADER}{cost(one)}.", *lines[end:]]) + "\n"


def with_costs(text: str, rows: list[dict[str, Any]]) -> str:
    """Return configs/recipes/README.md with the planned costs in its tables."""
    for one in rows:
        cell = rf"(\| `{re.escape(one['name'])}` \|(?:[^|\n]*\|){{3}})[^|\n]*\|"
        text = re.sub(cell, lambda found, one=one: f"{found[1]} {cost(one)} |", text)
    return text


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the record and all texts that follow from it."""
    (folder / "recipes.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "recipes.md").write_text(page(rows))
    for one in rows:
        file = FOLDER / f"{one['name']}.yaml"
        if file.is_file():
            file.write_text(with_cost(file.read_text(), one))
    readme = FOLDER / "README.md"
    readme.write_text(with_costs(readme.read_text(), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=None)
    args = parser.parse_args()
    record = None if args.out is None else args.out / "recipes.json"
    old = json.loads(record.read_text()) if record is not None and record.is_file() else []
    found = {one["name"]: one for one in old}
    known: dict[str, Plan] = {}
    for name, flags in runs().items():
        if args.only is not None and name not in args.only:
            continue
        job, module, rollouts = parsed(flags)
        key = key_of(job, module)
        if key not in known:
            cards = (card_named(CARD),) if job.on_gpu else ()
            known[key] = plan(module, job, bytes_of(MEMORY), cards)
        found[name] = row(name, flags, job, known[key], rollouts)
        print(json.dumps(found[name]), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            write(args.out, [found[name] for name in runs() if name in found])
    rows = [found[name] for name in runs() if name in found]
    print(table(rows))
    if args.out:
        write(args.out, rows)


if __name__ == "__main__":
    main()
