"""Computes whether a run fits: memory of each phase on one rank, and settings that make it fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from kdrl_lightning.hardware.planning.cards import Card
from kdrl_lightning.hardware.planning.engine import (
    awake,
    decoding,
    pushing,
    sampling,
    with_cache,
)
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.meter import Cost
from kdrl_lightning.hardware.planning.models import depth_of
from kdrl_lightning.hardware.planning.rehearsal import Rehearsal, rehearse
from kdrl_lightning.hardware.planning.seconds import NO_WORK, Seconds, Work, seconds_of, work_of
from kdrl_lightning.hardware.planning.shapes import config_of
from kdrl_lightning.hardware.planning.teachers.own_prompts import own_prompts_of, tokens_per_token
from kdrl_lightning.hardware.planning.teachers.stand_ins import local_teachers
from kdrl_lightning.models.loading import model_path
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.teachers.wrapped import WrappedTeacher

# Assumed bytes on a GPU besides tensors: the driver's context and the libraries' buffers.
CONTEXT = 1.2e9
# Assumed fragmentation of torch's allocator, as a part of the tensors.
GAPS = 0.04
MOST_CHANGES = 4
# oneDNN caches 1,024 descriptors of 258 kB each, one per shape of a matrix product, in two places.
DESCRIPTORS = "oneDNN, which multiplies in bfloat16 on a CPU, caches up to 0.5 GB more"
# Numbers of layers with which we count a deep student.
DEPTHS = 2, 4


@dataclass(frozen=True)
class Phase:
    """Memory of a phase of a rollout.

    Attributes:
        name: ``sample``, ``score``, ``update``, ``step`` or ``push``.
        parts: bytes on one rank at the peak, by name (``student``, ``activations``, ...).
    """

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a run needs on one rank, by calculation.

    Attributes:
        phases: memory of each phase, in the order of a rollout.
        memory: bytes of a device that tensors can take; None if no memory was given.
        tokens: tokens of the largest micro-batch.
        largest: most tokens of a micro-batch that fit; None if not even one completion fits, or
            no memory was given.
        checkpoint: bytes of one checkpoint on the disk.
        kept: number of checkpoints that stay on the disk.
        head: bytes of the tables of one chunk of logits, a part of the workspace.
        seconds: seconds of a rollout, by the name of a GPU.
        cures: settings that make the run fit, if it does not; empty if we find none.
        notes: assumptions of the plan.
    """

    phases: list[Phase]
    memory: float | None
    tokens: int
    largest: int | None
    checkpoint: float
    kept: int
    head: float
    seconds: dict[str, Seconds]
    cures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every phase fits; true if no memory was given."""
        return self.memory is None or self.worst.total <= self.memory

    # `Any`: values of JSON.
    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary for JSON, in bytes and seconds."""
        return {
            "fits": self.fits,
            "usable_bytes": self.memory,
            "breaks": None if self.fits else self.worst.name,
            "cures": self.cures,
            "micro_batch_tokens": self.tokens,
            "max_tokens_per_micro_batch": self.largest,
            "phases": {p.name: {**p.parts, "sum": p.total} for p in self.phases},
            "head_chunk_bytes": self.head,
            "checkpoint_bytes": self.checkpoint,
            "kept_checkpoints": self.kept,
            "seconds_per_rollout": {n: s.as_dict() for n, s in self.seconds.items()},
            "notes": self.notes,
        }


def plan(
    module: KDRLModule,
    job: Job,
    memory: float | None = None,
    cards: tuple[Card, ...] = (),
    cure: bool = True,
) -> Plan:
    """Return what a run needs, counted without loading weights and without using GPUs.

    Args:
        module: the module of the run; it is not changed.
        job: the run's other settings.
        memory: bytes of a device; None: give no verdict.
        cards: GPUs to estimate seconds for.
        cure: whether to look for settings that make the run fit, if it does not.

    Raises:
        ConfigurationError: a model's configuration is missing, or settings contradict each other.

    Example::

        module = KDRLModule("Qwen/Qwen3-0.6B", GRPO())
        plan(module, Job(RolloutSettings(max_tokens=2048)), memory=80e9).fits
    """
    usable = usable_of(job, memory)
    made = at_full_depth(module, job, lambda run: _counted(run, memory, bool(cards)))
    config = config_of(model_path(module.student_source), job.model_configs)
    sample, *others = made.phases
    held = with_cache(sample.parts, made.decoded, config, job, usable)
    made = replace(made, phases=[Phase("sample", held), *others])
    largest = None if usable is None else _largest(made, job, usable)
    found = Plan(
        made.phases,
        usable,
        job.largest_micro_batch,
        largest,
        made.checkpoint,
        job.kept_checkpoints,
        made.head,
        {card.name: seconds_of(made.work, job, card) for card in cards},
        notes=_notes(module, job),
    )
    if found.fits or not cure:
        return found
    return replace(found, cures=cures(module, job, memory, found))


def usable_of(job: Job, memory: float | None) -> float | None:
    """Return the bytes of a device that tensors can take."""
    if memory is None or not job.on_gpu:
        return memory
    return (memory - CONTEXT) / (1 + GAPS)


@dataclass(frozen=True)
class Counted:
    """What one rehearsal counts; every number is linear in the number of the student's layers.

    Attributes:
        phases: all phases, with the largest micro-batch.
        other: ``score`` and ``update`` with a micro-batch of another size, ``other_tokens(job)``.
        checkpoint: bytes of one checkpoint.
        head: bytes of the tables of one chunk of logits.
        work: operations and sizes, from which seconds follow.
        decoded: bytes to decode some completions; see ``decoding``.
    """

    phases: list[Phase]
    other: list[Phase]
    checkpoint: float
    head: float
    work: Work
    decoded: list[float]


def at_full_depth(module: KDRLModule, job: Job, count: Callable[[Rehearsal], Counted]) -> Counted:
    """Count a run; count a deep student at two small depths and extrapolate to its depth.

    Equal layers add equal bytes and operations, so two depths give those of any depth.
    """
    layers = depth_of(module, job)
    if layers is None:
        with rehearse(copy.deepcopy(module), job) as run:
            return count(run)
    both: list[Counted] = []
    known: dict[Any, Cost] = {}
    for depth in DEPTHS:
        with rehearse(copy.deepcopy(module), replace(job, depth=depth)) as run:
            run.known = known
            both.append(count(run))
    steps = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    whole: Counted = _line(both[0], both[1], steps)
    return whole


# `Any`: numbers, texts, and lists, mappings and dataclasses of them.
def _line(one: Any, two: Any, steps: float) -> Any:
    """Return ``one + (two - one) * steps`` for every number."""
    if isinstance(one, int | float):
        return one + (two - one) * steps
    if isinstance(one, dict):
        return {k: _line(one.get(k, 0), two.get(k, 0), steps) for k in {**one, **two}}
    if isinstance(one, list):
        return [_line(a, b, steps) for a, b in zip(one, two, strict=True)]
    if is_dataclass(one) and not isinstance(one, type):
        values = (_line(getattr(one, f.name), getattr(two, f.name), steps) for f in fields(one))
        return type(one)(*values)
    return one


def _counted(run: Rehearsal, memory: float | None, timed: bool) -> Counted:
    job, waiting = run.job, awake(run, memory)
    sample = Phase("sample", sampling(run, memory))
    push, step = Phase("push", pushing(run)), _step(run, waiting)
    score, update = _of_tokens(run, job.largest_micro_batch, waiting)
    other = other_tokens(job)
    return Counted(
        [sample, score, update, step, push],
        [] if other is None else list(_of_tokens(run, other, waiting)),
        run.checkpoint(),
        run.head_chunk(),
        work_of(run) if timed else NO_WORK,
        decoding(run),
    )


def other_tokens(job: Job) -> int | None:
    """Return a second micro-batch size to count; None if a step has a single completion.

    It is close to the first size, because memory grows faster while a micro-batch is smaller than a
    chunk of the head.
    """
    if job.largest_micro_batch > job.longest:
        return max(job.longest, job.largest_micro_batch // 2 // job.longest * job.longest)
    return 2 * job.longest if job.rows > 1 else None


def _step(run: Rehearsal, waiting: dict[str, float]) -> Phase:
    return Phase("step", {**run.held, **waiting, "workspace": run.step().peak})


def _of_tokens(run: Rehearsal, tokens: int, waiting: dict[str, float]) -> tuple[Phase, Phase]:
    """Return the phases that depend on the size of a micro-batch."""
    away = 0 if run.student.sharded else run.away
    # The student scores first, before weights that wait in the host's memory are on the card.
    offloaded, peak = max(
        ((0 if name == "student" else away, cost.peak) for name, cost in run.score(tokens).items()),
        key=sum,
        default=(0, 0),
    )
    fetched: dict[str, float] = {"next layer": run.next_layer()}
    score: dict[str, float] = {
        **run.held,
        **waiting,
        **fetched,
        "offloaded teacher": offloaded,
        "workspace": peak,
    }
    update = run.update(tokens)
    parts = {
        **run.held,
        **waiting,
        **fetched,
        # A teacher that the updates read stays on the card.
        "offloaded teacher": away if run.module.objective.divergence else 0,
        "gradients": run.held["gradients"] + update.whole,
        "activations": update.kept,
        "workspace": max(0, update.peak - update.kept) + run.second_table(),
    }
    return Phase("score", _nonzero(score)), Phase("update", _nonzero(parts))


def _largest(made: Counted, job: Job, usable: float) -> int | None:
    """Return the most tokens of a micro-batch that fit; memory is linear in the tokens.

    No attention kernel that we use keeps a matrix of tokens by tokens, which would be quadratic.
    """
    tokens, other = job.largest_micro_batch, other_tokens(job)
    least, most = job.longest, job.rows * job.longest
    if other is None:
        return tokens if all(phase.total <= usable for phase in made.phases[1:3]) else None
    limits = [float(most)]
    for phase, second in zip(made.phases[1:3], made.other, strict=True):
        slope = (phase.total - second.total) / (tokens - other)
        if slope > 0:
            limits.append(tokens + (usable - phase.total) / slope)
        elif phase.total > usable:
            return None
    found = int(min(limits)) // job.longest * job.longest  # whole completions
    return found if found >= least else None


def cures(module: KDRLModule, job: Job, memory: float | None, made: Plan) -> list[str]:
    """Return settings that make a run fit, found by planning the run with them.

    Each change lowers the phase that needs the most memory after the earlier changes.
    """
    module, said = copy.deepcopy(module), []
    for _ in range(MOST_CHANGES):
        change = next_change(module, job, made)
        if change is None:
            return []
        text, job = change
        said.append(text)
        made = plan(module, job, memory, cure=False)
        if made.fits:
            return said
    return []


def next_change(module: KDRLModule, job: Job, made: Plan) -> tuple[str, Job] | None:
    """Return a setting that lowers the phase that needs the most memory, and the job with it.

    Settings of the module are changed in place. None: we know no such setting.
    """
    phase, sampler = made.worst.name, job.sampler
    assert made.memory is not None
    if phase in ("score", "update") and made.largest is not None and made.largest < made.tokens:
        rows = max(1, made.largest // job.longest)
        accumulate = -(-job.rows // rows)
        tokens = rows * job.longest
        rollout = replace(job.rollout, max_tokens_per_micro_batch=tokens)
        text = f"--data.rollout.max_tokens_per_micro_batch {tokens}"
        text += f" --trainer.accumulate_grad_batches {accumulate}"
        return text, replace(job, rollout=rollout, accumulate=accumulate)
    if "engine" in made.worst.parts and phase != "sample" and phase != "push" and job.on_gpu:
        text = "--data.rollout_engine.init_args.sleep true"
        return text, replace(job, sampler=replace(sampler, sleep=True))
    if phase == "sample" and sampler.max_cached_tokens is not None:
        text = "--data.rollout_engine.init_args.max_cached_tokens null"
        return text, replace(job, sampler=replace(sampler, max_cached_tokens=None))
    if phase == "sample" and sampler.kind == "vllm" and sampler.cache_bytes is None:
        share = sampler.share - (made.worst.total - made.memory) / (made.memory * (1 + GAPS))
        share = int(share * 100) / 100 - 0.01
        if share >= 0.1:
            text = f"--data.rollout_engine.init_args.gpu_memory_utilization {share:.2f}"
            return text, replace(job, sampler=replace(sampler, share=share))
    if phase == "update" and not module.activation_checkpointing:
        module.activation_checkpointing = True
        return "--model.activation_checkpointing true", job
    if job.ranks > 1 and job.strategy != "fsdp2":
        return "--trainer.strategy fsdp2", replace(job, strategy="fsdp2")
    waiting = [t for t in local_teachers(module.teacher) if not t.offload]
    if waiting and phase != "score":
        for teacher in waiting:
            teacher.offload = True
        wraps, inner = "", module.teacher
        while isinstance(inner, WrappedTeacher):
            wraps, inner = f"{wraps}.init_args.teacher", inner.teacher
        return f"--model.teacher{wraps}.init_args.offload true", job
    return None


def _notes(module: KDRLModule, job: Job) -> list[str]:
    notes = [f"the longest prompt has {job.longest_prompt} tokens"]
    share, assumed = tokens_per_token(module, job)
    own = own_prompts_of(module, job, share)
    if own is not None:
        notes.append(f"the longest prompt that the teacher reads has {own.tokens} tokens")
    notes += [text for text in (assumed, own.note if own else "") if text]
    if job.on_gpu:
        notes.append(f"{CONTEXT / 1e9:g} GB of a card and {GAPS:.0%} of the tensors are set aside")
    if job.mixed and not job.on_gpu:
        notes.append(DESCRIPTORS)
    if job.rollout.max_tokens_per_micro_batch is None and job.accumulate > 1:
        notes.append(
            "without `max_tokens_per_micro_batch`, short completions batched with long ones can "
            "put more "
            "tokens in a micro-batch than completions of one length"
        )
    return notes


def _nonzero(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: size for name, size in parts.items() if size}
