"""SDPO (arXiv 2601.20802): top tokens with a tail, a capped ratio, the hybrid, its denominator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from helpers.objective_rows import LENGTHS, tables
from helpers.objective_steps import K, V, graded, normal, ready, same, step, student
from helpers.one_position import expected_gradient
from helpers.reference import close, forward_kl_gradient, reverse_kl_gradient
from kdrl_lightning import GKD, GRPO, SDPO, ConfigurationError, OnPolicyDistillation
from kdrl_lightning.objectives import CappedKL, TruncatedImportance, VocabularyKL, WrongCompletions

LOGITS, TEACHER = normal(V, seed=1), normal(V, seed=2).log_softmax(-1)
BEST = LOGITS.argsort(descending=True)


def compared(k: int) -> dict[str, Any]:
    """The student's K most likely tokens, and what the teacher gives them."""
    return {"asked": BEST[:k], "teacher_topk_logprobs": TEACHER[BEST[:k]].expand(V, 1, k)}


@pytest.mark.parametrize("near", [0.0, 1.0])
def test_it_is_the_paper_s_loss_token_by_token(near: float) -> None:
    """Divided by the distilled tokens; the engine's correction weights them as well."""
    objective = SDPO(
        top_k=K, selection=[WrongCompletions()], engine_correction=TruncatedImportance()
    )
    batch = ready(objective, step(mixed=False))
    scores = student(batch, near=near)
    x = tables(batch, scores)
    student_k, teacher_k = scores.topk_logprobs.tolist(), batch.teacher_topk_logprobs.tolist()
    total, count, ratios = 0.0, 0, []
    for i, n in enumerate(LENGTHS):
        for t in range(0 if batch.correct[i] else n):
            p, q = ([math.exp(y) for y in table[i][t]] for table in (student_k, teacher_k))
            p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
            mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            jsd = sum(
                0.5 * a * math.log(a / m) for row in (p, q) for a, m in zip(row, mean, strict=True)
            )
            ratios.append(x.rho(i, t))
            engine = min(math.exp(x.old[i][t] - x.mu[i][t]), 2.0)
            total, count = total + min(ratios[-1], 2.0) * engine * jsd, count + 1
    close(graded(objective, batch, scores)[0], total / count)
    assert near == 0.0 or max(ratios) > 2.0
    assert graded(objective, batch, scores)[1]["logprobs"].eq(0).all()  # the ratio has no gradient


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_all_tokens_as_top_k_are_the_full_vocabulary(beta: float) -> None:
    found = expected_gradient(SDPO(0.0, beta, V), LOGITS, TEACHER, **compared(V))
    close(found, expected_gradient(SDPO(0.0, beta, None), LOGITS, TEACHER))


def test_the_ends_of_its_divergence() -> None:
    s, t = LOGITS.log_softmax(-1).tolist(), TEACHER.tolist()
    close(expected_gradient(SDPO(0.0, 0.0, None), LOGITS, TEACHER), forward_kl_gradient(s, t))
    close(expected_gradient(SDPO(0.0, 1.0, None), LOGITS, TEACHER), reverse_kl_gradient(s, t))


def test_its_sampled_form_is_on_policy_distillation() -> None:
    """In expectation, reverse KL over the vocabulary is a policy gradient with advantage d."""
    sampled = OnPolicyDistillation(kl_estimator="policy_gradient")
    found = expected_gradient(SDPO(0.0, 1.0, None), LOGITS, TEACHER)
    close(found, expected_gradient(sampled, LOGITS, TEACHER))


def test_without_the_tail_mass_would_leave_the_top_tokens() -> None:
    """Where student and teacher agree, the gradient is 0 only with the bucket for the rest."""
    same_rows = {"asked": BEST[:K]}
    agreed = LOGITS.log_softmax(-1)
    topk = agreed[BEST[:K]].expand(V, 1, K)
    found = expected_gradient(
        SDPO(0.0, 1.0, K), LOGITS, agreed, teacher_topk_logprobs=topk, **same_rows
    )
    close(found, torch.zeros(V))
    leaf = LOGITS.clone().requires_grad_()
    rows = leaf.log_softmax(-1)[BEST[:K]]
    bare = (rows.exp() * (rows - agreed[BEST[:K]])).sum()
    assert torch.autograd.grad(bare, leaf)[0].abs().max() > 0.01


def test_at_the_first_update_the_ratio_is_one() -> None:
    batch = step(mixed=False)
    scores = student(batch, near=0.0)
    plain = GKD(0.5, top_k=K, kd_per_imitated_token=True)
    ours = SDPO(top_k=K)
    found = graded(ours, ready(ours, batch), scores)
    expected = graded(plain, ready(plain, batch), scores)
    close(found[0], expected[0])
    close(found[1]["topk_logprobs"], expected[1]["topk_logprobs"])


@pytest.mark.parametrize("mix", [0.3, 0.9, 1.0])
def test_the_hybrid_mixes_two_losses(mix: float) -> None:
    batch, scores = step(mixed=False), student(step(mixed=False))
    found, rl, kd = (
        graded(o, ready(o, batch), scores)
        for o in (SDPO(mix, top_k=K), GRPO(scale_by_std=False), SDPO(top_k=K))
    )
    close(found[0], mix * rl[0] + (1 - mix) * kd[0])
    for name in ("logprobs", "topk_logprobs"):
        close(found[1][name], mix * rl[1][name] + (1 - mix) * kd[1][name])


def test_a_step_without_a_distilled_row_is_zero_with_a_graph() -> None:
    objective = SDPO(top_k=K)
    batch = objective.prepare(step())
    batch = batch.replace(imitation_mask=torch.zeros_like(batch.loss_mask))
    batch = batch.replace(totals=batch.count(9))
    loss, gradients = graded(objective, batch, student(batch))
    assert loss.item() == 0.0
    assert gradients["topk_logprobs"].eq(0).all()


def test_a_part_can_be_added_to_any_method() -> None:
    """Without the cap it is the divergence itself."""
    same(
        GRPO(distill=CappedKL(0.3, 1.0, K, None, False)),
        GRPO(distill=VocabularyKL(0.3, 1.0, K)),
        step(),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_mix": 1.5}, r"`reward_mix` must be in \[0, 1\]: got 1.5"),
        ({"ratio_cap": 0.5}, "`ratio_cap` must be at least 1: got 0.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SDPO(**settings)
