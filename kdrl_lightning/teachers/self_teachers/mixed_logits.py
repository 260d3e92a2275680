"""A mixture of two models' logits, written as one model with one head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdrl_lightning.losses.logprobs import Other, TokenScores, token_scores
from kdrl_lightning.rollout_batch import RolloutBatch


def mix(first: Other, second: Other, second_share: float, one_head: bool) -> Other:
    """Return states and a head whose logits are ``(1 - a)`` the first's plus ``a`` the second's.

    Logits are linear in states and head, so the two models become one of twice the width. This
    holds for heads without a soft cap.

    Args:
        first: ``[N, H]`` states and head of one model.
        second: states and head of the other model, at the same tokens.
        second_share: a, in [0, 1].
        one_head: both heads have the same weights, so the states can be mixed instead.
    """
    if one_head:
        return first._replace(hidden=torch.lerp(first.hidden, second.hidden, second_share))
    (states, head), (others, other) = first[:2], second[:2]
    hidden = torch.cat([states * (1.0 - second_share), others * second_share], -1)
    bias = head.bias
    if bias is not None and other.bias is not None:
        bias = torch.lerp(bias, other.bias, second_share)
    weight = torch.cat([head.weight, other.weight], -1)
    return Other(hidden, replace(head, weight=weight, bias=bias))


def scores_from(
    batch: RolloutBatch, model: Other, chunk_size: int | None, topk_ids: Tensor | None
) -> TokenScores:
    """Return scores ``[B, T]`` from a model's states at a batch's completion tokens.

    Args:
        batch: B completions; N tokens in all.
        model: ``[N, H]`` states, and the head.
        chunk_size: tokens whose logits exist at once.
        topk_ids: ``[B, T, K]``, further tokens to score; None for none.
    """
    rows, columns = batch.completion_mask.nonzero(as_tuple=True)
    found = token_scores(
        model.hidden,
        model.head,
        batch.completion_ids[rows, columns],
        batch.temperature,
        chunk_size,
        top_k=1,
        topk_ids=None if topk_ids is None else topk_ids[rows, columns],
    )

    def spread(value: Tensor) -> Tensor:
        blank = value.new_zeros(*batch.completion_ids.shape, *value.shape[1:])
        return blank.index_put((rows, columns), value)

    return found.map(spread)
