"""Scores that the coming update's own forward passes give: room for them, and filling it."""

from __future__ import annotations

import torch

from kdrl_lightning.losses.logprobs import LOGPROB_FLOOR, Other, TokenScores, token_scores
from kdrl_lightning.rollout_batch import RolloutBatch


def with_room(batch: RolloutBatch, dtype: torch.dtype, top_token: bool) -> RolloutBatch:
    """Return a batch whose old scores are yet to come: NaN, so that nobody takes them for values.

    Args:
        batch: not scored by the student.
        dtype: of the scores.
        top_token: leave room for the student's most likely tokens, too.
    """
    shape, device = batch.completion_mask.shape, batch.completion_mask.device
    return batch.replace(
        old_logprobs=torch.full(shape, torch.nan, dtype=dtype, device=device),
        old_entropy=torch.full(shape, torch.nan, dtype=dtype, device=device),
        topk_ids=torch.zeros_like(batch.completion_ids)[..., None] if top_token else None,
    )


def with_teacher_room(batch: RolloutBatch, dtype: torch.dtype) -> RolloutBatch:
    """Leave the same room for a teacher that the update runs in any case."""
    shape, device = batch.completion_mask.shape, batch.completion_mask.device
    return batch.replace(
        teacher_logprobs=torch.full(shape, torch.nan, dtype=dtype, device=device),
        teacher_entropy=torch.full(shape, torch.nan, dtype=dtype, device=device),
        teacher_top_ids=torch.zeros_like(batch.completion_ids),
        teacher_pending=True,
    )


@torch.no_grad()
def fill_teacher(batch: RolloutBatch, teacher: Other, chunk_size: int | None) -> None:
    """Write in what a teacher says whose hidden states are there; 0 on padding."""
    real = batch.completion_mask
    ids = batch.completion_ids[real]
    found = token_scores(*teacher, ids, batch.temperature, chunk_size, top_k=1)
    best = None if found.topk_ids is None else found.topk_ids[..., 0]
    for field, value in (
        (batch.teacher_logprobs, found.logprobs.clamp(min=LOGPROB_FLOOR)),
        (batch.teacher_entropy, found.entropy),
        (batch.teacher_top_ids, best),
    ):
        if field is not None and value is not None:
            field.zero_()[real] = value.to(field.dtype)


def fill(batch: RolloutBatch, scores: TokenScores) -> None:
    """Write the student's scores into a batch that waits for them, for callbacks too."""
    for field, value in (
        (batch.old_logprobs, scores.logprobs),
        (batch.old_entropy, scores.entropy),
        (batch.topk_ids, scores.topk_ids),
    ):
        if field is not None and value is not None:
            field.copy_(value.detach())
