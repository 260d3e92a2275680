"""Completions of given lengths, for a rehearsal."""

from __future__ import annotations

import torch

from kdrl_lightning.rollout_batch import RolloutBatch, collate


def make_batch(
    rows: int, prompt: int, completion: int, group: int, vocabulary: int
) -> RolloutBatch:
    """Return completions of one length, all different.

    Args:
        rows: number of completions.
        prompt: tokens of each prompt.
        completion: tokens of each completion.
        group: completions per prompt.
        vocabulary: ids are below it.
    """
    draw = torch.Generator().manual_seed(0)
    # Under `without_numbers`: integers are real.
    ids = torch.randint(0, vocabulary, (rows, completion), generator=draw)
    prompts = [[(3 + i // max(group, 1)) % vocabulary] * prompt for i in range(rows)]
    groups = [i // max(group, 1) for i in range(rows)]
    return collate(prompts, ids.tolist(), groups, pad_id=0)


def in_pairs(batch: RolloutBatch) -> RolloutBatch:
    """Return each row twice, as a group whose rewards differ, for rules that compare a group."""
    rows = [*range(len(batch)), *range(len(batch))]
    return batch.select(rows).replace(
        group_ids=torch.tensor(rows),
        rewards=torch.tensor([float(i >= len(batch)) for i in range(len(rows))]),
    )
