"""Seconds of a rollout on a GPU, by calculation from operations and bytes. Nothing is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kdrl_lightning.engines.cache_budget import GROWTH, SHARE
from kdrl_lightning.hardware.planning.cards import Card
from kdrl_lightning.hardware.planning.engine import awake, cache_values
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.rehearsal import Rehearsal

# Assumptions: shares of a card's data sheet that training, scoring and decoding reach, and seconds
# of a layer's kernels for one token, which no batch makes shorter without CUDA graphs.
TRAINS, SCORES, READS = 0.4, 0.5, 0.6
LAUNCHES = 25 * 6e-6
# Completions that vLLM decodes at once by default: on cards with so much memory, and on others.
LARGE_CARD, ON_LARGE, ON_OTHERS = 70 * 2**30, 1024, 256


@dataclass(frozen=True)
class Seconds:
    """Seconds of a rollout on each rank, plus or minus a half.

    Attributes:
        sample: the engine.
        score: teacher, reference and the student in advance.
        update: all optimizer steps.
    """

    sample: float
    score: float
    update: float

    @property
    def total(self) -> float:
        """All of a rollout, without pushes, rewards and communication."""
        return self.sample + self.score + self.update

    def as_dict(self) -> dict[str, float]:
        """Return the parts and their sum."""
        return {**asdict(self), "sum": self.total}


@dataclass(frozen=True)
class Work:
    """Operations and sizes of a rank's part of a rollout, with completions of mean length.

    Attributes:
        score: operations to score all completions.
        update: operations of one pass of updates over all completions.
        weights: numbers in the student.
        cache: numbers that an engine keeps per token.
        layers: of the student.
        held: bytes on the card besides what sampling needs.
    """

    score: float
    update: float
    weights: float
    cache: float
    layers: float
    held: float


NO_WORK = Work(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def work_of(run: Rehearsal) -> Work:
    """Count the work of a rollout."""
    job, costs = run.job, run.typical()
    share = job.rows * job.rollout.minibatches_per_rollout / costs.rows
    held = sum(run.held.values()) + sum(awake(run, None).values())
    return Work(
        share * costs.score,
        share * costs.update,
        run.whole_copy(1),
        cache_values(run),
        run.layers,
        held,
    )


def seconds_of(work: Work, job: Job, card: Card) -> Seconds:
    """Return seconds for completions of typical length."""
    return Seconds(
        _sampling(work, job, card) if job.sampler.kind != "elsewhere" else 0.0,
        work.score / (card.flops * SCORES),
        work.update * job.rollout.epochs_per_rollout / (card.flops * TRAINS),
    )


def _sampling(work: Work, job: Job, card: Card) -> float:
    """Return seconds to decode a rank's completions: reading weights and cache bounds each step."""
    graphs = job.sampler.kind == "vllm"
    size = 2 if graphs or job.mixed else 4
    weights = work.weights * size
    each = work.cache * size * (job.longest_prompt + job.typical / 2)
    completions = job.rows * job.rollout.minibatches_per_rollout
    rows = min(_at_once(work, job, card, size), completions)
    floor = 0.0 if graphs else LAUNCHES * work.layers
    full = max(floor, (weights + rows * each) / (card.bandwidth * READS))
    alone = max(floor, weights / (card.bandwidth * READS))
    steps = completions / rows * job.typical
    return float(steps * full + max(0.0, job.rollout.max_tokens - job.typical) * alone)


def _at_once(work: Work, job: Job, card: Card, size: int) -> float:
    """Return how many completions an engine decodes at once on a card; ``size`` is in bytes."""
    sampler, value = job.sampler, work.cache * size
    if sampler.kind == "vllm":
        large = card.memory > LARGE_CARD and not card.name.startswith("A100")
        most: float = sampler.max_sequences or (ON_LARGE if large else ON_OTHERS)
        room = sampler.cache_bytes or sampler.share * card.memory - work.weights * size
        tokens = room / value
        longest: float = job.longest_prompt + job.typical / 2
    else:
        most = sampler.max_sequences or float("inf")
        tokens = SHARE * (card.memory - work.held) / (GROWTH * value)
        tokens = sampler.max_cached_tokens or tokens
        longest = job.longest
    return max(1, min(most, int(tokens / longest)))
