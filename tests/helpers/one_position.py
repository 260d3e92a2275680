"""Enumerates one position of a small softmax: every token of the vocabulary is a completion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.losses import TokenScores
from kdrl_lightning.objectives import Objective
from kdrl_lightning.rollout_batch import RolloutBatch, collate


def position(student: Tensor, teacher: Tensor, **fields: Any) -> RolloutBatch:
    """Return a rollout of one group whose completions are the V tokens, scored.

    Args:
        student: ``[V]`` log-probabilities.
        teacher: ``[V]`` log-probabilities.
        fields: further fields; one for all rows, ``[V]``, becomes a column.
    """
    size = len(student)
    batch = collate([[1]] * size, [[v] for v in range(size)], [0] * size, pad_id=0)
    columns = {
        n: x[:, None] if torch.is_tensor(x) and x.dim() == 1 else x for n, x in fields.items()
    }
    return batch.replace(
        rewards=torch.zeros(size, dtype=torch.float64),
        old_logprobs=student.detach()[:, None],
        teacher_logprobs=teacher[:, None],
        teacher_entropy=(-(teacher.exp() * teacher).sum()).expand(size, 1),
        **columns,
    )


def expected_gradient(
    objective: Objective,
    logits: Tensor,
    teacher: Tensor,
    asked: Tensor | None = None,
    **fields: Any,
) -> Tensor:
    """Return the gradient ``[V]`` of the loss's expectation over the student's samples.

    Args:
        objective: the objective whose terms are taken without their reduction.
        logits: ``[V]``, the student's.
        teacher: ``[V]`` log-probabilities.
        asked: ``[K]`` token ids whose log-probabilities the objective compares.
        fields: see ``position``.
    """
    leaf = logits.clone().requires_grad_()
    rows = leaf.log_softmax(-1)
    batch = objective.prepare(position(rows.detach(), teacher, **fields))
    batch = batch.replace(totals=batch.count(1))
    size = len(logits)
    topk = None if asked is None else rows[asked].expand(size, 1, len(asked))
    gap = None
    if objective.divergence is not None:
        gap = objective.divergence(rows, teacher).expand(size, 1)
    scores = TokenScores(rows[:, None], torch.zeros(size, 1), None, topk, gap)
    probabilities = rows.detach().exp()[:, None]
    total = sum(
        (term.coef * probabilities * _masked(term.per_token, term.mask)).sum()
        for term in objective.terms(batch, scores)
    )
    (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask, values, 0.0)
