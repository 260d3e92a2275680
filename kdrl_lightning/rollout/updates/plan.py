"""Turn a rollout into optimizer steps: mini-batches, micro-batches, scores and totals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from kdrl_lightning.rollout.updates.partition import partition, teacher_passes
from kdrl_lightning.rollout_batch import RolloutBatch, StepTotals
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.own_prompt.groups import as_read

OLD_FIELDS = ("old_logprobs", "old_entropy", "topk_ids")
TEACHER_FIELDS = (
    "teacher_logprobs",
    "chunk_places",
    "teacher_entropy",
    "teacher_top_ids",
    "teacher_topk_ids",
    "teacher_topk_logprobs",
    "teacher_tail_logprobs",
)
# Most tokens of one pass by teacher or reference. It keeps no activations for a gradient, so it can
# be larger than a micro-batch.
FROZEN_TOKENS = 4096
# A layer repeats a prompt's keys and values for each row; these may be so many times the tokens.
REPEATED = 4


@dataclass(frozen=True)
class RolloutPlan:
    """A scored rollout and its cut into updates.

    Attributes:
        rollout: index of the rollout.
        batch: this rank's completions, scored and prepared.
        updates: rows of ``batch`` for each micro-batch of each optimizer step.
        totals: counts over all ranks of each optimizer step.
        metrics: measurements; the first micro-batch carries them.
        first_update: the update at which the rollout was made; above 0 after a resume within it.
        unscored: number of first updates without stored scores of the student; the forward passes
            of these updates give the scores.
    """

    rollout: int
    batch: RolloutBatch
    updates: list[list[list[int]]]
    totals: list[StepTotals]
    metrics: Mapping[str, float | None]
    first_update: int = 0
    unscored: int = 0

    def micro_batch(self, update: int, micro: int) -> RolloutBatch:
        """Return one micro-batch, trimmed to its longest row."""
        first = update == self.first_update and micro == 0
        part = self.batch.select(self.updates[update][micro])
        missing = OLD_FIELDS if update < self.unscored else ()
        return part.replace(
            totals=self.totals[update],
            metrics=self.metrics if first else {},
            **dict.fromkeys(missing),
        )

    @property
    def padding_frac(self) -> float:
        """Share of padding in the micro-batches, in [0, 1)."""
        lengths: list[int] = self.batch.lengths.tolist()
        parts = [[lengths[r] for r in rows] for update in self.updates for rows in update]
        area = sum(len(part) * max(part) for part in parts)
        return 1.0 - sum(map(sum, parts)) / area

    def with_metrics(
        self, metrics: Mapping[str, float | None], first_update: int = 0
    ) -> RolloutPlan:
        """Return a copy with measurements and the update that carries them."""
        return replace(self, metrics=metrics, first_update=first_update)


class Scoring(Protocol):
    """The part of a ``Policy`` that scores and prepares a rollout."""

    def score(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the student's scores."""

    def score_reference(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the reference's scores, if there is a reference."""

    def score_teacher(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the teacher's scores, if there is a teacher."""

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with what the objective decides once for the whole rollout."""

    def reduce(self, value: Tensor, operation: str) -> Tensor:
        """Return a tensor reduced over ranks by ``sum`` or ``max``."""


@dataclass(frozen=True)
class Cut:
    """How rollouts are cut into updates.

    Attributes:
        minibatches: number of disjoint parts; each has whole groups and gives one update.
        epochs: number of passes over a rollout; every pass has the same mini-batches.
        micro_batches: number of micro-batches per update.
        max_tokens: the token limit of a completion.
        max_micro_tokens: most tokens of a micro-batch, with padding.
        frozen_tokens: most tokens, with padding, of joined micro-batches that teacher and reference
            score in one pass; 0: they score each micro-batch alone.
        teacher: the teacher, if it reads other tokens than the student; ``max_micro_tokens`` limits
            its passes by these.
    """

    minibatches: int
    epochs: int
    micro_batches: int
    max_tokens: int
    max_micro_tokens: float = float("inf")
    frozen_tokens: float = 0.0
    teacher: Teacher | None = None

    def updates(self, batch: RolloutBatch) -> list[list[list[int]]]:
        """Return the rows of each micro-batch of each update in one pass over the rollout."""
        lengths = batch.lengths.tolist()
        groups = int(batch.group_ids.max()) + 1
        members: list[list[int]] = [[] for _ in range(self.minibatches)]
        for row, group in enumerate(batch.group_ids.tolist()):
            members[group * self.minibatches // groups].append(row)
        updates = []
        for rows in members:
            sizes = [lengths[r] for r in rows]
            parts = partition(sizes, self.micro_batches, self.max_micro_tokens)
            updates.append([[rows[i] for i in part] for part in parts])
        return updates


@dataclass(frozen=True)
class Waits:
    """Scores that updates give, so that no separate scoring pass is needed.

    Attributes:
        student: the first update's forward pass gives the student's scores of its completions.
        teacher: each update runs the teacher for a divergence over the full vocabulary.
    """

    student: bool = False
    teacher: bool = False


# Runs the scoring of the frozen models on every rank and returns the scored batch.
Guard = Callable[[Callable[[], RolloutBatch]], RolloutBatch]


def unguarded(work: Callable[[], RolloutBatch]) -> RolloutBatch:
    """Return the result of ``work``."""
    return work()


def plan_updates(
    batch: RolloutBatch,
    rollout: int,
    cut: Cut,
    scoring: Scoring,
    waits: Waits,
    guard: Guard = unguarded,
) -> RolloutPlan:
    """Return a new rollout, scored and cut into optimizer steps.

    The student scores the same micro-batches that the updates use. So old log-probabilities equal
    those of the first update bit for bit, and scoring needs no more memory than an update. Teacher
    and reference score joined micro-batches up to ``cut.frozen_tokens``, so that they run a prompt
    in several micro-batches only once.

    Args:
        batch: this rank's completions; groups are in the order of their mini-batches.
        rollout: index of the rollout.
        cut: sizes of the updates.
        scoring: scores and prepares.
        waits: scores that the updates give.
        guard: runs the scoring of the frozen models.
    """
    # 1. Cut the rows into updates and micro-batches.
    updates = cut.updates(batch)
    first, later = updates[0], list(chain.from_iterable(updates[1:]))
    # 2. Score with the student, except what the first update's forward pass gives.
    batch = _scored(batch, later if waits.student else [*first, *later], scoring.score, OLD_FIELDS)
    # 3. Score with the reference, and with the teacher unless each update runs it.
    parts = [*first, *later]
    batch = guard(partial(_frozen, batch, parts, cut, scoring, waits))
    # 4. Let the objective decide what holds for the whole rollout. It gets the student's scores of
    #    all completions or of none.
    hidden = OLD_FIELDS if waits.student else ()
    kept = {name: getattr(batch, name) for name in hidden}
    batch = scoring.prepare(batch.replace(**dict.fromkeys(hidden))).replace(**kept)
    # 5. Count each step over all ranks.
    return _plan(batch, rollout, updates, cut, scoring, int(waits.student))


def _frozen(
    batch: RolloutBatch, parts: list[list[int]], cut: Cut, scoring: Scoring, waits: Waits
) -> RolloutBatch:
    wide = joined(parts, batch, cut.frozen_tokens)
    batch = _scored(batch, wide, scoring.score_reference, ("ref_logprobs",))
    if waits.teacher:
        return batch
    return _taught(batch, parts, cut, scoring)


def _taught(
    batch: RolloutBatch, parts: list[list[int]], cut: Cut, scoring: Scoring
) -> RolloutBatch:
    """Return the batch with the teacher's scores, in passes that keep the limit of tokens."""
    teacher, tokens, limit = cut.teacher, cut.frozen_tokens, cut.max_micro_tokens
    read = batch if batch.teacher_prompt_ids is None else _by_prompt(as_read(batch))
    passes: Iterable[list[int]]
    if teacher is not None and teacher.aligns:  # later completions may still be aligned
        wide = joined(parts, read, tokens)
        passes = teacher_passes(wide, batch, teacher, limit, scoring.reduce)
    else:
        passes = teacher_passes(parts, batch, teacher, limit, scoring.reduce)
        passes = joined(list(passes), read, tokens)
    return _scored(batch, passes, scoring.score_teacher, TEACHER_FIELDS)


def resume_updates(
    batch: RolloutBatch,
    rollout: int,
    cut: Cut,
    scoring: Scoring,
    waits: Waits,
    guard: Guard = unguarded,
) -> RolloutPlan:
    """Return a checkpoint's rollout, which is scored and prepared already, cut into updates.

    Args:
        batch: this rank's completions.
        rollout: index of the rollout.
        cut: sizes of the updates.
        scoring: scores with the teacher if the earlier run left that to its updates and this run
            does not.
        waits: scores that the updates give.
        guard: runs the scoring of the teacher.
    """
    updates = cut.updates(batch)
    if batch.teacher_logprobs is None and not waits.teacher:
        rows = list(chain.from_iterable(updates))
        batch = guard(partial(_taught, batch, rows, replace(cut, frozen_tokens=0.0), scoring))
    return _plan(batch, rollout, updates, cut, scoring, 0)


def _plan(
    batch: RolloutBatch,
    rollout: int,
    updates: list[list[list[int]]],
    cut: Cut,
    scoring: Scoring,
    unscored: int,
) -> RolloutPlan:
    totals = [
        step_totals(batch.select(sorted(chain.from_iterable(u))), cut.max_tokens, scoring.reduce)
        for u in updates
    ]
    return RolloutPlan(
        rollout, batch, updates * cut.epochs, totals * cut.epochs, {}, unscored=unscored
    )


def joined(parts: list[list[int]], batch: RolloutBatch, max_tokens: float) -> list[list[int]]:
    """Return parts, with neighbours joined if that adds no tokens; a prompt counts once per part.

    Args:
        parts: lists of rows of ``batch``.
        batch: all completions.
        max_tokens: most tokens of a joined part, with padding. With the prompt counted in each of
            its rows, the limit is ``REPEATED`` times that.
    """
    prompts: list[int] = batch.prompt_lengths.tolist()
    completions: list[int] = batch.completion_lengths.tolist()
    groups = batch.group_ids.tolist()

    def tokens(rows: list[int]) -> tuple[int, int]:
        prompt, completion = (max(lengths[r] for r in rows) for lengths in (prompts, completions))
        shared = len({groups[r] for r in rows}) * prompt + len(rows) * completion
        return shared, len(rows) * (prompt + completion)

    out: list[list[int]] = []
    for rows in parts:
        both = [*out[-1], *rows] if out else []
        shared, whole = tokens(both) if both else (0, 0)
        fits = bool(both) and shared <= max_tokens and whole <= REPEATED * max_tokens
        if fits and shared <= tokens(out[-1])[0] + tokens(rows)[0]:
            out[-1] = both
        else:
            out.append(rows)
    return out


def _by_prompt(batch: RolloutBatch) -> RolloutBatch:
    """Return a batch whose groups are the rows with one prompt.

    Prompts of the teacher can differ within a group of the student, and be equal in two.
    """
    place = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    prompts = batch.input_ids.masked_fill(place >= batch.prompt_lengths[:, None], -1)
    return batch.replace(group_ids=prompts.unique(dim=0, return_inverse=True)[1])


def _scored(
    batch: RolloutBatch,
    parts: Iterable[list[int]],
    score: Callable[[RolloutBatch], RolloutBatch],
    names: tuple[str, ...],
) -> RolloutBatch:
    """Return the batch with the fields ``names`` from ``score`` of each part; other rows get 0."""
    whole: dict[str, Tensor] = {}
    for rows in parts:
        part = score(batch.select(rows))
        for name in names:
            value = getattr(part, name)
            if value is None:
                continue
            if name not in whole:
                whole[name] = value.new_zeros(*batch.completion_ids.shape, *value.shape[2:])
            index = torch.tensor(rows, device=value.device)
            whole[name][index, : value.shape[1]] = value
    return batch.replace(**whole)


def step_totals(
    batch: RolloutBatch, max_tokens: int, reduce: Callable[[Tensor, str], Tensor]
) -> StepTotals:
    """Return an optimizer step's counts over all ranks, from this rank's completions of it."""
    here = batch.count(max_tokens)
    counts = torch.tensor(
        [
            here.num_loss_tokens,
            here.num_imitated_tokens,
            here.num_completions,
            here.num_prompts,
            here.imitation_weight,
        ],
        dtype=torch.float64,
    )
    tokens, imitated, completions, prompts, weight = reduce(counts, "sum").tolist()
    return StepTotals(tokens, imitated, completions, prompts, max_tokens, weight)
