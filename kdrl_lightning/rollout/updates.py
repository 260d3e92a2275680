"""From one rollout to its optimizer steps: mini-batches, micro-batches, scores and totals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdrl_lightning.rollout.partition import partition
from kdrl_lightning.rollout_batch import RolloutBatch, StepTotals

OLD = ("old_logprobs", "old_entropy", "topk_ids")
TEACHER = ("teacher_logprobs", "teacher_entropy", "teacher_top_ids")
FROZEN = (*TEACHER, "teacher_topk_logprobs", "teacher_tail_logprobs", "ref_logprobs")
# A pass without gradient keeps no activations: it may take more than a micro-batch at once.
FROZEN_TOKENS = 4096
# In a layer a prompt's keys and values are repeated for each row: so many times the tokens.
REPEATED = 4


@dataclass(frozen=True)
class RolloutPlan:
    """A scored rollout and how its updates are cut.

    Attributes:
        rollout: its index.
        batch: this rank's completions, scored and prepared.
        updates: per optimizer step, per micro-batch, the rows of ``batch``.
        totals: per optimizer step, its counts over all ranks.
        metrics: measurements, handed out with the first micro-batch.
        first_update: the update at which the rollout was made; not 0 after a resume in between.
    """

    rollout: int
    batch: RolloutBatch
    updates: list[list[list[int]]]
    totals: list[StepTotals]
    metrics: Mapping[str, float]
    first_update: int = 0

    def micro_batch(self, update: int, micro: int) -> RolloutBatch:
        """Return one micro-batch, trimmed to its own longest row."""
        first = update == self.first_update and micro == 0
        part = self.batch.select(self.updates[update][micro])
        return part.replace(
            totals=self.totals[update],
            metrics=self.metrics if first else {},
            old_pending=self.batch.old_pending and update == 0,
        )

    @property
    def padding_frac(self) -> float:
        """Share of padding in the rectangles of one replay."""
        lengths: list[int] = self.batch.lengths.tolist()
        parts = [[lengths[r] for r in rows] for update in self.updates for rows in update]
        area = sum(len(part) * max(part) for part in parts)
        return 1.0 - sum(map(sum, parts)) / area

    def with_metrics(self, metrics: Mapping[str, float], first_update: int = 0) -> RolloutPlan:
        """Return a copy with measurements, and the update that is to carry them."""
        return replace(self, metrics=metrics, first_update=first_update)


def plan_updates(
    batch: RolloutBatch,
    *,
    rollout: int,
    minibatches: int,
    epochs: int,
    micro_batches: int,
    max_tokens: int,
    max_micro_tokens: float,
    score: Callable[[RolloutBatch], RolloutBatch],
    prepare: Callable[[RolloutBatch], RolloutBatch],
    reduce: Callable[[Tensor, str], Tensor],
    score_first: Callable[[RolloutBatch], RolloutBatch] | None = None,
    leave_teacher_room: Callable[[RolloutBatch], RolloutBatch] | None = None,
    score_frozen: Callable[[RolloutBatch], RolloutBatch] = lambda batch: batch,
    frozen_tokens: float = 0,
) -> RolloutPlan:
    """Cut, score and prepare a rollout.

    The student's scoring runs on the very micro-batches of the updates, so that old
    log-probabilities equal those of the first update bit for bit, and need no more memory. That of
    teacher and reference joins micro-batches up to ``frozen_tokens``, so that a prompt that several
    of them share is run once.

    Args:
        batch: this rank's completions; groups in the order of their mini-batches.
        rollout: its index.
        minibatches: disjoint parts, whole groups, one update each.
        epochs: replays; every replay has the same mini-batches.
        micro_batches: per update.
        max_tokens: the token limit of a completion.
        max_micro_tokens: of a micro-batch, padding included.
        score: adds the student's scores to a part.
        prepare: the objective's, on the whole rollout.
        reduce: ``(tensor, "sum") -> tensor`` over ranks.
        score_first: instead of ``score`` on the parts of the first update, where that update's own
            forward pass gives the student's scores and ``prepare`` does not read them.
        leave_teacher_room: makes room for the teacher's scores, where the updates run it for a
            divergence and ``prepare`` does not read them.
        score_frozen: adds the scores of teacher and reference to a part.
        frozen_tokens: of such a part, where it is more than one micro-batch.
    """
    groups = int(batch.group_ids.max()) + 1
    lengths = batch.lengths.tolist()
    members: list[list[int]] = [[] for _ in range(minibatches)]
    for row, group in enumerate(batch.group_ids.tolist()):
        members[group * minibatches // groups].append(row)
    updates = []
    for rows in members:
        parts = partition([lengths[r] for r in rows], micro_batches, max_micro_tokens)
        updates.append([[rows[i] for i in part] for part in parts])
    first, later = updates[0], [rows for update in updates[1:] for rows in update]
    batch = _scored(batch, first, score_first or score, OLD)
    batch = _scored(batch, later, score, OLD)
    if leave_teacher_room is not None:
        batch = leave_teacher_room(batch)
    wide = joined([*first, *later], batch, frozen_tokens)
    batch = _scored(batch, wide, score_frozen, FROZEN)
    # What is yet to come is hidden, so that whoever reads it after all is told.
    names = (*(OLD if score_first else ()), *(TEACHER if batch.teacher_pending else ()))
    room = {name: getattr(batch, name) for name in names}
    batch = prepare(batch.replace(**dict.fromkeys(names))).replace(**room)
    batch = batch.replace(old_pending=score_first is not None)
    totals = [step_totals(batch.select(rows), max_tokens, reduce) for rows in members]
    return RolloutPlan(rollout, batch, updates * epochs, totals * epochs, {})


def joined(parts: list[list[int]], batch: RolloutBatch, max_tokens: float) -> list[list[int]]:
    """Join neighbouring parts where that is no more work, prompts counted once.

    Args:
        parts: rows of ``batch``.
        batch: of all rows.
        max_tokens: of a joined part, padding included; prompts in each of their rows, ``REPEATED``
            times as many.
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


def _scored(
    batch: RolloutBatch,
    parts: list[list[int]],
    score: Callable[[RolloutBatch], RolloutBatch],
    names: tuple[str, ...],
) -> RolloutBatch:
    """Run ``score`` on parts and gather the fields of ``names``."""
    whole: dict[str, Tensor] = {}
    for rows in parts:
        part = score(batch.select(rows))
        for name in names:
            value = getattr(part, name)
            if value is None:
                continue
            if name not in whole:
                old = getattr(batch, name)
                blank = value.new_zeros(*batch.completion_ids.shape, *value.shape[2:])
                whole[name] = blank if old is None else old.clone()
            index = torch.tensor(rows, device=value.device)
            whole[name][index, : value.shape[1]] = value
    return batch.replace(**whole)


def step_totals(
    batch: RolloutBatch, max_tokens: int, reduce: Callable[[Tensor, str], Tensor]
) -> StepTotals:
    """Count one rank's completions of an optimizer step, summed over ranks."""
    own = batch.count(max_tokens)
    counts = torch.tensor(
        [own.num_loss_tokens, own.num_imitated_tokens, own.num_completions, own.num_prompts],
        dtype=torch.float64,
    )
    tokens, imitated, completions, prompts = reduce(counts, "sum").tolist()
    return StepTotals(tokens, imitated, completions, prompts, max_tokens)
