"""Objectives say whether a token's derivative depends on other tokens' scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.objective_steps import PRESETS, REDUCTIONS, ready, step, student
from helpers.reference import close
from kdrl_lightning.objectives import GRPO, PolicyObjective, SequenceRatio, TokenScores


def derivatives(objective: Any, batch: Any, scores: TokenScores) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (scores.logprobs, scores.entropy)]  # type: ignore[union-attr]
    gap = scores.divergence.detach().requires_grad_()  # type: ignore[union-attr]
    given = scores._replace(logprobs=leaves[0], entropy=leaves[1], divergence=gap)
    loss, _ = objective(batch, given)
    found = torch.autograd.grad(loss, [*leaves, gap], allow_unused=True, materialize_grads=True)
    return list(found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", PRESETS)
def test_tokens_are_coupled_where_the_objective_says_so(name: str, reduction: Any) -> None:
    objective = PRESETS[name](reduction=reduction, entropy_coef=0.1)
    batch = ready(objective, step())
    scores = student(batch, near=0.3)
    whole = derivatives(objective, batch, scores)
    # Half of the tokens are scored, in a pattern that cuts completions; the others are still 0.
    half = torch.arange(batch.completion_ids.numel()).view_as(batch.completion_ids) % 2 == 0
    part = derivatives(objective, batch, scores.map(lambda x: x.where(_like(half, x), 0)))
    same = all(torch.allclose(a[half], b[half], 1e-12) for a, b in zip(part, whole, strict=True))
    assert same == (not objective.couples_tokens)
    if same:
        for a, b in zip(part, whole, strict=True):
            close(a[half], b[half])


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.unsqueeze(-1) if value.dim() == 3 else mask


def test_one_coupling_part_couples() -> None:
    assert not GRPO().couples_tokens
    advantage = GRPO().advantage
    assert PolicyObjective(ratio=SequenceRatio(), advantage=advantage).couples_tokens
