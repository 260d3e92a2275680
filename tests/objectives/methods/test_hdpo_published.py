"""HDPO as published (arXiv 2603.23871): which completions are kept; no RL statistic has them."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.objective_rows import LENGTHS
from helpers.objective_steps import (
    GROUPS,
    MAX_TOKENS,
    ORDER,
    THEIRS,
    K,
    graded,
    ready,
    step,
    student,
    table_gradient,
)
from helpers.reference import close, log_softmax
from kdrl_lightning import GRPO, PublishedHDPO
from kdrl_lightning.rollout_batch import RolloutBatch

OURS = [i for i in range(16) if not THEIRS[i]]


def failed(kept: bool = True) -> RolloutBatch:
    """A step whose second group only the teacher solves, and whose third it need not."""
    batch = step()
    correct = torch.tensor([g != 2 for g in GROUPS])
    correct[7] = kept
    return batch.replace(correct=correct)


def of_students(batch: RolloutBatch) -> RolloutBatch:
    return batch.select(OURS)


def test_grpo_s_part_is_that_of_the_student_s_completions_alone() -> None:
    """Advantages and denominator are those without the teacher's rows."""
    batch, scores = failed(), student(failed())
    found = graded(o := PublishedHDPO(0.0, K), ready(o, batch), scores)
    alone = of_students(batch)
    own = scores.map(lambda x: x.detach()[OURS].requires_grad_())
    expected = graded(o := GRPO(), ready(o, alone), own)
    close(found[0], expected[0])
    close(found[1]["logprobs"][OURS], expected[1]["logprobs"])
    theirs = [i for i in range(16) if THEIRS[i]]
    assert found[1]["logprobs"][theirs].eq(0).all()


@pytest.mark.parametrize("kept", [True, False])
def test_only_correct_answers_to_failed_prompts_are_imitated(kept: bool) -> None:
    batch = ready(PublishedHDPO(top_k=K), failed(kept))
    rows = batch.imitation_mask.any(1).nonzero().flatten().tolist()
    assert rows == ([7] if kept else [])
    # The teacher's other completions are in no loss and no count.
    assert not batch.loss_mask[[3, 11, 15]].any()
    own = int(batch.student_mask.sum())
    assert batch.totals.num_loss_tokens == own + (LENGTHS[7] if kept else 0)


def test_the_divergence_is_divided_by_the_kept_tokens() -> None:
    objective = PublishedHDPO(0.1, K)
    batch = ready(objective, failed())
    scores = student(batch)
    without = graded(o := PublishedHDPO(0.0, K), ready(o, failed()), scores)[0]
    student_k, teacher_k = scores.topk_logprobs.tolist(), batch.teacher_topk_logprobs.tolist()
    total = 0.0
    for t in range(LENGTHS[7]):
        p = [math.exp(x) for x in student_k[7][t]]
        q = [math.exp(x) for x in log_softmax(teacher_k[7][t])]
        p, q = [*p, 1 - sum(p)], [*q, 0.0]
        mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        pairs = [*zip(p, mean, strict=True), *zip(q, mean, strict=True)]
        jsd = sum(0.5 * a * math.log(a / m) for a, m in pairs if a)
        assert 0.0 <= jsd <= math.log(2)
        total += jsd
    close(graded(objective, batch, scores)[0] - without, 0.1 * total / LENGTHS[7])


def test_if_nothing_is_kept_it_is_grpo_with_a_graph() -> None:
    objective = PublishedHDPO(0.1, K)
    batch, scores = ready(objective, failed(False)), student(step())
    loss, shares = objective(batch, scores)
    assert shares["teacher_top_k"] == 0.0 and loss.requires_grad
    expected = graded(o := PublishedHDPO(0.0, K), ready(o, failed(False)), scores)
    close(loss.detach(), expected[0])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_cut_of_the_step_changes_nothing(parts: int) -> None:
    objective = PublishedHDPO(0.1, K)
    batch = ready(objective, failed())
    assert batch.totals == batch.count(MAX_TOKENS)
    whole = table_gradient(objective, batch, [range(16)])
    cut = table_gradient(objective, batch, [ORDER[i::parts] for i in range(parts)])
    close(cut[0], whole[0])
    close(cut[1], whole[1])
