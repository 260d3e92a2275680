"""Makes batches of given lengths, and their scores, for a rehearsal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.teachers.own_prompts import OwnPrompts
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.objectives import Objective
from kdrl_lightning.rollout.updates.scoring import FROZEN_TOKENS, REPEATED
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers.own_prompt.groups import OwnPrompt, with_prompts


def make_batch(
    rows: int, prompt: int, completion: int, group: int, vocabulary: int
) -> RolloutBatch:
    """Return a batch of different completions of equal length.

    Args:
        rows: number of completions.
        prompt: tokens of each prompt.
        completion: tokens of each completion.
        group: completions per prompt.
        vocabulary: upper bound of the token ids.
    """
    draw = torch.Generator().manual_seed(0)
    # Inside `without_numbers`, integers stay real.
    ids = torch.randint(0, vocabulary, (rows, completion), generator=draw)
    prompts = [[(3 + i // max(group, 1)) % vocabulary] * prompt for i in range(rows)]
    groups = [i // max(group, 1) for i in range(rows)]
    return collate(prompts, ids.tolist(), groups, pad_id=0)


def with_own_prompts(
    batch: RolloutBatch, own: OwnPrompts, longest: int, vocabulary: int
) -> RolloutBatch:
    """Return a batch with the prompts that the teacher reads.

    Args:
        batch: completions.
        own: the longest of these prompts.
        longest: tokens of the student's longest prompt; a shorter batch gets shorter prompts.
        vocabulary: upper bound of the token ids.
    """
    tokens = math.ceil(int(batch.prompt_lengths.max()) * own.tokens / longest)
    places = range(len(batch)) if own.differ else batch.group_ids.tolist()
    return with_prompts(batch, [OwnPrompt([(5 + place) % vocabulary] * tokens) for place in places])


def joined_rows(batch: RolloutBatch, own: OwnPrompts | None, job: Job) -> int:
    """Return how many completions frozen models score in one pass, after the longest prompts.

    A pass joins micro-batches up to ``FROZEN_TOKENS``, where a prompt counts once per group.

    Args:
        batch: a micro-batch.
        own: the prompts that the models read; None: the student's.
        job: gives the run's limits.
    """
    prompt = int(batch.prompt_lengths.max()) if own is None else own.tokens
    completion = batch.completion_ids.shape[1]
    group = 1 if own is not None and own.differ else job.group
    most = min(FROZEN_TOKENS, job.rollout.max_tokens_per_micro_batch or FROZEN_TOKENS)
    rows = wider = len(batch)
    while wider <= job.rows:
        shared = -(-wider // group) * prompt + wider * completion
        if shared > most or wider * (prompt + completion) > REPEATED * most:
            break
        rows, wider = wider, wider + len(batch)
    return rows


def in_pairs(batch: RolloutBatch) -> RolloutBatch:
    """Return each row twice, as a group with different rewards, for group-relative advantages."""
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
    """Return a batch with all fields that an update reads, filled with real zeros.

    Args:
        batch: completions.
        module: decides which scores the batch has, and prepares it.
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
    teacher = module.frozen.active
    if teacher is not None and objective.divergence is None:
        aligns = teacher.aligns
        batch = batch.replace(
            teacher_logprobs=scores,
            chunk_places=torch.zeros_like(batch.completion_ids) if aligns else None,
            teacher_entropy=None if aligns else scores,
            teacher_top_ids=None if aligns else batch.completion_ids,
            teacher_topk_ids=top,
            teacher_topk_logprobs=None if top is None else torch.zeros(top.shape),
            teacher_tail_logprobs=None if top is None else scores,
        )
    ready = module.prepare(in_pairs(batch)).select(range(len(batch)))
    ready = ready.replace(group_ids=batch.group_ids)
    return ready.replace(totals=ready.count(max_tokens))
