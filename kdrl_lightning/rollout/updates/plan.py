"""Turn a rollout into optimizer steps: mini-batches, micro-batches, scores and totals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from kdrl_lightning.common import old_names
from kdrl_lightning.rollout.updates.cut import Cut
from kdrl_lightning.rollout.updates.scoring import (
    OLD_FIELDS,
    Scoring,
    Waits,
    score_frozen,
    score_taught,
    scored,
)
from kdrl_lightning.rollout_batch import RolloutBatch, StepTotals

# Former names of this module.
__getattr__ = old_names.names_of("kdrl_lightning.rollout.updates.scoring")


@dataclass(frozen=True)
class RolloutPlan:
    """A scored rollout, split into updates.

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
    """Return a new rollout, scored and split into optimizer steps.

    The student scores the same micro-batches that the updates use. So old log-probabilities equal
    those of the first update bit for bit, and scoring needs no more memory than an update. Teacher
    and reference score joined micro-batches up to ``cut.frozen_tokens``, so that they run a prompt
    only once, even if several micro-batches share it.

    Args:
        batch: this rank's completions; groups are in the order of their mini-batches.
        rollout: index of the rollout.
        cut: sizes of the updates.
        scoring: scores and prepares the batch.
        waits: scores that need no separate pass, because the updates give them.
        guard: runs the scoring of the frozen models.
    """
    # 1. Cut the rows into updates and micro-batches.
    updates = cut.updates(batch)
    first, later = updates[0], list(chain.from_iterable(updates[1:]))
    # 2. Score with the student, except what the first update's forward pass gives.
    batch = scored(batch, later if waits.student else [*first, *later], scoring.score, OLD_FIELDS)
    # 3. Score with the reference, and with the teacher unless each update runs it.
    parts = [*first, *later]
    batch = guard(partial(score_frozen, batch, parts, cut, scoring, waits))
    # 4. Let the objective set its fields, e.g. advantages. It gets the student's scores of all
    #    completions or of none.
    hidden = OLD_FIELDS if waits.student else ()
    kept = {name: getattr(batch, name) for name in hidden}
    batch = scoring.prepare(batch.replace(**dict.fromkeys(hidden))).replace(**kept)
    # 5. Count each step over all ranks.
    return _plan(batch, rollout, updates, cut, scoring, int(waits.student))


def resume_updates(
    batch: RolloutBatch,
    rollout: int,
    cut: Cut,
    scoring: Scoring,
    waits: Waits,
    guard: Guard = unguarded,
) -> RolloutPlan:
    """Split a checkpoint's rollout, which is already scored and prepared, into updates.

    Args:
        batch: this rank's completions.
        rollout: index of the rollout.
        cut: sizes of the updates.
        scoring: scores with the teacher if the earlier run left that to its updates and this run
            does not.
        waits: scores that need no separate pass, because the updates give them.
        guard: runs the scoring of the teacher.
    """
    updates = cut.updates(batch)
    if batch.teacher_logprobs is None and not waits.teacher:
        rows = list(chain.from_iterable(updates))
        batch = guard(partial(score_taught, batch, rows, replace(cut, frozen_tokens=0.0), scoring))
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


def step_totals(
    batch: RolloutBatch, max_tokens: int, reduce: Callable[[Tensor, str], Tensor]
) -> StepTotals:
    """Return an optimizer step's counts over all ranks, from this rank's completions."""
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
