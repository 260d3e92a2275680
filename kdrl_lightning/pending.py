"""Old scores that the coming update's own forward pass gives: room for them, and filling it."""

from __future__ import annotations

import torch

from kdrl_lightning.losses.logprobs import TokenScores
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


def fill(batch: RolloutBatch, scores: TokenScores) -> None:
    """Write the student's scores into a batch that waits for them, for callbacks too."""
    for field, value in (
        (batch.old_logprobs, scores.logprobs),
        (batch.old_entropy, scores.entropy),
        (batch.topk_ids, scores.topk_ids),
    ):
        if field is not None and value is not None:
            field.copy_(value.detach())
