"""Completions of given lengths, for a rehearsal."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.module import KDRLModule
from kdrl_lightning.objectives import Objective
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


def zeros_of_ids(objective: Objective, batch: RolloutBatch) -> Tensor | None:
    """Return ``[B, T, K]`` ids for an objective that compares K top tokens, else None."""
    k = objective.top_k or objective.teacher_top_k
    return torch.zeros(*batch.completion_ids.shape, k, dtype=torch.long) if k else None


def with_scores(batch: RolloutBatch, module: KDRLModule, max_tokens: int) -> RolloutBatch:
    """Return completions with all that an update finds: real zeros, because only shapes count.

    Args:
        batch: completions.
        module: asks for the scores, and prepares the batch.
        max_tokens: the token limit of a completion.
    """
    objective, scores = module.objective, torch.zeros(batch.completion_ids.shape)
    top = zeros_of_ids(objective, batch)
    batch = batch.replace(
        old_logprobs=scores,
        old_entropy=scores,
        topk_ids=top,
        rollout_logprobs=scores,
        ref_logprobs=scores if objective.needs_reference else None,
    )
    if module.teacher is not None and objective.divergence is None:
        batch = batch.replace(
            teacher_logprobs=scores,
            teacher_entropy=scores,
            teacher_top_ids=batch.completion_ids,
            teacher_topk_ids=top,
            teacher_topk_logprobs=None if top is None else torch.zeros(top.shape),
            teacher_tail_logprobs=None if top is None else scores,
        )
    ready = module.prepare(in_pairs(batch)).select(range(len(batch)))
    ready = ready.replace(group_ids=batch.group_ids)
    return ready.replace(totals=ready.count(max_tokens))
