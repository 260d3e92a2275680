"""The teacher's own most likely tokens, and its log-probabilities of them."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.losses.logprobs import TokenScores, token_scores
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher


@torch.no_grad()
def own_top_k(teacher: Teacher, batch: RolloutBatch, top_k: int) -> TokenScores:
    """Return a teacher's scores of sampled tokens and of its own most likely ones.

    The teacher's model runs once, its head twice.

    Args:
        teacher: a teacher with ``gives_states``.
        batch: B completions of at most T tokens.
        top_k: number K of tokens, at least 1.

    Returns:
        Scores ``[B, T]`` as ``Teacher.score`` returns them, with the teacher's K most likely tokens
        in ``topk_ids``, best first, their log-probabilities in ``topk_logprobs``, and the
        log-probability of all other tokens together in ``tail_logprobs``.
    """
    model = teacher.states(batch)
    # We find the tokens once: each selection by a mask would make the host wait for a GPU.
    tokens = batch.completion_mask.nonzero(as_tuple=True)
    ids = batch.completion_ids[tokens]
    where = model.hidden, model.head, ids, batch.temperature
    found = token_scores(*where, top_k=top_k)
    at = token_scores(*where, topk_ids=found.topk_ids)

    def spread(value: Tensor) -> Tensor:
        blank = value.new_zeros(*batch.completion_ids.shape, *value.shape[1:])
        return blank.index_put(tokens, value)

    whole = found._replace(topk_logprobs=at.topk_logprobs, tail_logprobs=at.tail_logprobs)
    return whole.map(spread)
