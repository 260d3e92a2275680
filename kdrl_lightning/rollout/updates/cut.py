"""Splits rollouts into updates and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from kdrl_lightning.rollout.updates.partition import partition
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher


@dataclass(frozen=True)
class Cut:
    """Sizes of the updates and passes that a rollout is split into.

    Attributes:
        minibatches: number of disjoint parts; each has whole groups and gives one update.
        epochs: number of passes over a rollout; every pass has the same mini-batches.
        micro_batches: number of micro-batches per update.
        max_tokens: the token limit of a completion.
        max_micro_tokens: most tokens of a micro-batch, with padding.
        frozen_tokens: most tokens, with padding, of joined micro-batches that teacher and reference
            score in one pass; 0: they score each micro-batch alone.
        teacher: the teacher, if it reads other tokens than the student; ``max_micro_tokens`` then
            counts the teacher's tokens in its passes.
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
