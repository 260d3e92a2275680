"""SRPO as published (arXiv 2604.02288): which rows are distilled; weights normalised by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from helpers.objective_rows import LENGTHS, advantages, clipped, tables
from helpers.objective_steps import (
    CORRECT,
    MAX_TOKENS,
    ORDER,
    REWARDS,
    K,
    graded,
    ready,
    step,
    student,
    table_gradient,
)
from helpers.reference import close, f64
from kdrl_lightning import GRPO, SDPO, ConfigurationError, PublishedSRPO
from kdrl_lightning.objectives import ConfidenceWeightedKL, WrongCompletions
from kdrl_lightning.rollout.updates import step_totals
from kdrl_lightning.rollout_batch import RolloutBatch

# GRPO as its second branch is.
RL: dict[str, Any] = {"clip_high": 0.28, "scale_by_std": False}


def with_context(batch: RolloutBatch, rows: Any) -> RolloutBatch:
    return batch.replace(has_context=torch.as_tensor(rows).expand(len(batch)))


def jsd(p: list[float], q: list[float]) -> float:
    p, q = ([math.exp(x) for x in row] for row in (p, q))
    p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
    pairs = [(a, (a + b) / 2) for a, b in [*zip(p, q, strict=True), *zip(q, p, strict=True)]]
    return sum(0.5 * a * math.log(a / m) for a, m in pairs)


@pytest.mark.parametrize("near", [0.0, 1.0])
def test_it_is_the_paper_s_loss_token_by_token(near: float) -> None:
    objective = PublishedSRPO(2.0, top_k=K)
    context = [i % 4 != 1 for i in range(16)]
    batch = ready(objective, with_context(step(mixed=False), context))
    scores = student(batch, near=near)
    x, a = tables(batch, scores), advantages(REWARDS, False)
    entropy = batch.teacher_entropy.tolist()
    student_k, teacher_k = scores.topk_logprobs.tolist(), batch.teacher_topk_logprobs.tolist()
    tokens = [(i, t) for i, n in enumerate(LENGTHS) for t in range(n)]
    distilled = {(i, t) for i, t in tokens if not CORRECT[i] and context[i]}
    mean = sum(math.exp(-2 * entropy[i][t]) for i, t in distilled) / len(distilled)
    total = 0.0
    for i, t in tokens:
        if (i, t) in distilled:
            weight = math.exp(-2 * entropy[i][t]) / mean * min(x.rho(i, t), 2.0)
            total += weight * jsd(student_k[i][t], teacher_k[i][t])
        else:
            total += clipped(x.rho(i, t), a[i], 0.2, 0.28)[0]
    loss, gradients = graded(objective, batch, scores)
    close(loss, total / len(tokens))
    mask = batch.imitation_mask
    assert gradients["logprobs"][mask].eq(0).all()
    assert gradients["topk_logprobs"][mask].ne(0).all()
    assert gradients["topk_logprobs"][~mask].eq(0).all()
    # A wrong completion without context keeps its negative advantage.
    assert any(a[i] < 0 and not CORRECT[i] and LENGTHS[i] for i in range(16) if not context[i])


def test_without_any_context_it_is_grpo() -> None:
    batch, scores = with_context(step(), False), student(step())
    ours, plain = PublishedSRPO(top_k=K), GRPO(**RL)
    found, expected = (graded(o, ready(o, batch), scores) for o in (ours, plain))
    close(found[0], expected[0])
    close(found[1]["logprobs"], expected[1]["logprobs"])
    assert found[1]["topk_logprobs"].eq(0).all()


def test_an_all_wrong_group_without_a_sibling_gives_nothing() -> None:
    batch = step(mixed=False).select(range(4, 8))
    batch = with_context(batch.replace(rewards=torch.zeros(4, dtype=torch.float64)), False)
    loss, gradients = graded(o := PublishedSRPO(top_k=K), ready(o, batch), student(batch))
    assert loss == 0.0 and all(g.eq(0).all() for g in gradients.values())


def test_all_wrong_with_contexts_is_weighted_distillation() -> None:
    """Without weights it is SDPO: all loss tokens are distilled, so the denominators agree."""
    batch = step(mixed=False)
    batch = with_context(batch.replace(correct=torch.zeros_like(batch.correct)), True)
    scores = student(batch)
    ours, plain = PublishedSRPO(0.0, top_k=K), SDPO(top_k=K)
    found, expected = (graded(o, ready(o, batch), scores) for o in (ours, plain))
    close(found[0], expected[0])
    close(found[1]["topk_logprobs"], expected[1]["topk_logprobs"])
    weighted = graded(o := PublishedSRPO(1.0, top_k=K), ready(o, batch), scores)
    assert (weighted[0] - expected[0]).abs() > 1e-4


def test_a_constant_more_entropy_changes_no_weight() -> None:
    batch, scores = step(), student(step())
    more = batch.replace(teacher_entropy=batch.teacher_entropy + 0.7)
    found, expected = (
        graded(o := PublishedSRPO(top_k=K), ready(o, b), scores) for b in (more, batch)
    )
    close(found[0], expected[0])
    close(found[1]["topk_logprobs"], expected[1]["topk_logprobs"])


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_weights_are_normalised_over_all_ranks_and_micro_batches(shares: int) -> None:
    """Each rank counts its rows, and the sum over ranks is that of the whole step."""
    objective = PublishedSRPO(top_k=K)
    batch = ready(objective, step())
    parts = [ORDER[i::shares] for i in range(shares)]
    counted = [batch.select(rows).count(MAX_TOKENS) for rows in parts]

    def reduce(value: torch.Tensor, operation: str) -> torch.Tensor:
        own = counted[0].imitation_weight
        assert operation == "sum" and value[-1] == pytest.approx(own)
        return sum(
            (
                f64(
                    [
                        c.num_loss_tokens,
                        c.num_imitated_tokens,
                        c.num_completions,
                        c.num_prompts,
                        c.imitation_weight,
                    ]
                )
                for c in counted
            ),
            torch.zeros(5, dtype=torch.float64),
        )

    totals = step_totals(batch.select(parts[0]), MAX_TOKENS, reduce)
    close(totals.imitation_weight, batch.totals.imitation_weight)
    assert totals.imitation_weight > 0.0
    whole = table_gradient(objective, batch, [range(16)])
    split = table_gradient(objective, batch.replace(totals=totals), parts)
    close(split[0], whole[0])
    close(split[1], whole[1])


def test_the_reads_of_its_parts_are_declared() -> None:
    assert PublishedSRPO().needs_teacher_entropy and not SDPO().needs_teacher_entropy
    assert PublishedSRPO().reads_teacher_scores(step()) and not SDPO().reads_teacher_scores(step())
    rules = PublishedSRPO(selection=[WrongCompletions()]).selection
    assert [type(s).__name__ for s in rules] == ["WrongCompletions"] * 2


def test_a_negative_sharpness_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`sharpness` must be at least 0: got -1.0"):
        ConfidenceWeightedKL(sharpness=-1.0)
