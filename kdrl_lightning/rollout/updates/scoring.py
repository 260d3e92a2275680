"""Scores a rollout with student, reference and teacher, each in passes of a suitable size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdrl_lightning.rollout.updates.cut import Cut
from kdrl_lightning.rollout.updates.partition import teacher_passes
from kdrl_lightning.rollout_batch import RolloutBatch, upload
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
# Most tokens of one pass by teacher or reference. Such a pass keeps no activations for a gradient,
# so it can be larger than a micro-batch.
FROZEN_TOKENS = 4096
# Layers copy a shared prompt's keys and values for each row: at most this many times the tokens.
REPEATED = 4


class Scoring(Protocol):
    """The part of a ``Policy`` that scores and prepares a rollout."""

    def score(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the student's scores."""

    def score_reference(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the reference's scores, if there is a reference."""

    def score_teacher(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the teacher's scores, if there is a teacher."""

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the fields that the objective sets once per rollout."""

    def reduce(self, value: Tensor, operation: str) -> Tensor:
        """Return a tensor reduced over ranks by ``sum`` or ``max``."""


@dataclass(frozen=True)
class Waits:
    """Scores that updates give, so that no separate scoring pass is needed.

    Attributes:
        student: the first update's forward pass gives the student's scores of its completions.
        teacher: each update runs the teacher for a divergence over the full vocabulary.
    """

    student: bool = False
    teacher: bool = False


def score_frozen(
    batch: RolloutBatch, parts: list[list[int]], cut: Cut, scoring: Scoring, waits: Waits
) -> RolloutBatch:
    """Return the batch with the scores of the reference, and of the teacher unless updates run it.

    Args:
        batch: this rank's completions.
        parts: rows of each micro-batch.
        cut: limits of a pass.
        scoring: runs the models.
        waits: scores that need no separate pass, because the updates give them.
    """
    wide = joined(parts, batch, cut.frozen_tokens)
    batch = scored(batch, wide, scoring.score_reference, ("ref_logprobs",))
    if waits.teacher:
        return batch
    return score_taught(batch, parts, cut, scoring)


def score_taught(
    batch: RolloutBatch, parts: list[list[int]], cut: Cut, scoring: Scoring
) -> RolloutBatch:
    """Return the batch with the teacher's scores, in passes within the token limit."""
    teacher, tokens, limit = cut.teacher, cut.frozen_tokens, cut.max_micro_tokens
    read = batch if batch.teacher_prompt_ids is None else _by_prompt(as_read(batch))
    passes: Iterable[list[int]]
    if teacher is not None and teacher.aligns:  # it may still align later completions
        wide = joined(parts, read, tokens)
        passes = teacher_passes(wide, batch, teacher, limit, scoring.reduce)
    else:
        passes = teacher_passes(parts, batch, teacher, limit, scoring.reduce)
        passes = joined(list(passes), read, tokens)
    return scored(batch, passes, scoring.score_teacher, TEACHER_FIELDS)


def joined(parts: list[list[int]], batch: RolloutBatch, max_tokens: float) -> list[list[int]]:
    """Join neighbouring parts if that adds no tokens; a shared prompt counts once per part.

    Args:
        parts: lists of rows of ``batch``.
        batch: all completions.
        max_tokens: most tokens of a joined part, with padding. If the prompt is counted in each of
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
    """Return the batch regrouped by equal prompts.

    The teacher's prompts can differ within a group of the student, and be equal in two groups.
    """
    place = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    prompts = batch.input_ids.masked_fill(place >= batch.prompt_lengths[:, None], -1)
    return batch.replace(group_ids=prompts.unique(dim=0, return_inverse=True)[1])


def scored(
    batch: RolloutBatch,
    parts: Iterable[list[int]],
    score: Callable[[RolloutBatch], RolloutBatch],
    names: tuple[str, ...],
) -> RolloutBatch:
    """Return the batch with the fields ``names`` from scoring each part; other rows get 0."""
    whole: dict[str, Tensor] = {}
    for rows in parts:
        part = score(batch.select(rows))
        index = upload(torch.tensor(rows), batch.input_ids.device)
        for name in names:
            value = getattr(part, name)
            if value is None:
                continue
            if name not in whole:
                whole[name] = value.new_zeros(*batch.completion_ids.shape, *value.shape[2:])
            whole[name][index, : value.shape[1]] = value
    return batch.replace(**whole)
