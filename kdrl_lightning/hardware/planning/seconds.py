"""Estimates the seconds of a rollout on a GPU from operations and bytes, without measurements."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kdrl_lightning.engines.cache_budget import GROWTH, SHARE
from kdrl_lightning.hardware.planning.cards import Card
from kdrl_lightning.hardware.planning.engine import awake, cache_values
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.rehearsal.steps import Rehearsal

# Assumptions: the parts of the data sheet's peak that training, scoring and decoding reach, and the
# seconds to launch a layer's kernels, which bound a decoding step without CUDA graphs.
TRAINS, SCORES, READS = 0.4, 0.5, 0.6
LAUNCHES = 25 * 6e-6
# Bytes of a large GPU, and the completions that vLLM decodes at once there and on other GPUs.
LARGE_CARD, ON_LARGE, ON_OTHERS = 70 * 2**30, 1024, 256


@dataclass(frozen=True)
class Seconds:
    """Seconds of a rollout on each rank, ± 50 %.

    Attributes:
        sample: seconds in which the engine samples.
        score: seconds in which teacher, reference and student score before the updates.
        update: seconds of all optimizer steps.
    """

    sample: float
    score: float
    update: float

    @property
    def total(self) -> float:
        """The sum, without pushes, rewards and communication."""
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
        weights: number of the student's weights.
        cache: numbers in a KV cache per token.
        layers: number of the student's layers.
        held: bytes on the GPU that the KV cache cannot use.
    """

    score: float
    update: float
    weights: float
    cache: float
    layers: float
    held: float


NO_WORK = Work(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def work_of(run: Rehearsal) -> Work:
    """Return the operations and sizes of a rank's part of a rollout."""
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
    """Return the seconds of a rollout on a GPU, for completions of mean length."""
    return Seconds(
        _sampling(work, job, card) if job.sampler.kind != "elsewhere" else 0.0,
        work.score / (card.flops * SCORES),
        work.update * job.rollout.epochs_per_rollout / (card.flops * TRAINS),
    )


def _sampling(work: Work, job: Job, card: Card) -> float:
    """Return seconds to decode a rank's completions; memory bandwidth limits each step."""
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
    """Return how many completions an engine decodes at once, with ``size`` bytes per number."""
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
