"""Seconds of a rollout on a GPU, by calculation from operations and bytes. Nothing is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kdrl_lightning.hardware.planning.cards import Card
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.rehearsal import Rehearsal

# Assumptions: shares of a card's data sheet that training, scoring and decoding reach, and seconds
# of a layer's kernels for one token, which no batch makes shorter without CUDA graphs.
TRAINS, SCORES, READS = 0.4, 0.5, 0.6
LAUNCHES = 25 * 6e-6


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
    """

    score: float
    update: float
    weights: float
    cache: float
    layers: float


NO_WORK = Work(0.0, 0.0, 0.0, 0.0, 0.0)


def work_of(run: Rehearsal) -> Work:
    """Count the work of a rollout."""
    job, costs = run.job, run.typical()
    share = job.rows * job.rollout.minibatches_per_rollout / costs.rows
    return Work(
        share * costs.score, share * costs.update, run.whole_copy(1), run.cache_values(), run.layers
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
    sampler = job.sampler
    graphs = sampler.kind == "vllm"
    size = 2 if graphs else 4
    # Without graphs, weights are cast for each token: read, written and read.
    weights = work.weights * (size if graphs else size + 4)
    each = work.cache * size * (job.longest_prompt + job.typical / 2)
    completions = job.rows * job.rollout.minibatches_per_rollout
    rows = min(sampler.max_sequences, completions)
    if graphs and sampler.cache_bytes is None:
        room = max(sampler.share * card.memory - weights, each)
        rows = max(1, min(rows, int(room / each)))
    floor = 0.0 if graphs else LAUNCHES * work.layers
    full = max(floor, (weights + rows * each) / (card.bandwidth * READS))
    alone = max(floor, weights / (card.bandwidth * READS))
    steps = completions / rows * job.typical
    return float(steps * full + max(0.0, job.rollout.max_tokens - job.typical) * alone)
