"""EOPD (arXiv 2603.07079), and the divergence from a teacher's own top tokens."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.objective_rows import LENGTHS, THEIRS, clipped, slow, tables
from helpers.objective_steps import K, graded, ready, step, student
from helpers.one_position import expected_gradient
from helpers.reference import (
    close,
    forward_kl_gradient,
    kl,
    log_softmax,
    normal,
    reverse_kl_gradient,
)
from kdrl_lightning import EOPD, ConfigurationError, PolicyObjective
from kdrl_lightning.losses import TokenScores
from kdrl_lightning.objectives import FixedGap, TeacherTopK, TokenRatio

LOGITS, TEACHER = normal(5, seed=1), normal(5, seed=2).log_softmax(-1)
S = LOGITS.log_softmax(-1).tolist()
BEST = TEACHER.argsort(descending=True)


def top(k: int) -> dict[str, torch.Tensor]:
    """What the batch holds of the teacher's K most likely tokens."""
    return {"teacher_topk_logprobs": TEACHER[BEST[:k]].expand(5, 1, k)}


@pytest.mark.parametrize("near", [0.0, 0.3])
def test_it_is_the_paper_s_loss_token_by_token(near: float) -> None:
    objective = EOPD(0.5, K, reduction="sequence_mean")
    batch = ready(objective, step())
    scores = student(batch, near=near)
    x, entropy = tables(batch, scores), batch.teacher_entropy.tolist()
    student_k, teacher_k = scores.topk_logprobs.tolist(), batch.teacher_topk_logprobs.tolist()

    def policy(i: int, t: int) -> tuple[float, float]:
        gap = 0.0 if THEIRS[i] else x.teacher[i][t] - x.old[i][t]
        return clipped(x.rho(i, t), gap)

    def token(i: int, t: int) -> tuple[float, float]:
        value, slope = policy(i, t)
        if entropy[i][t] > 0.5:
            renormalised = log_softmax(teacher_k[i][t])
            value += kl(renormalised, student_k[i][t])
        return value, slope

    value, gradient = slow("sequence_mean", token)
    found = graded(objective, batch, scores)
    close(found[0], value)
    close(found[1]["logprobs"], gradient)
    unsure = [entropy[i][t] > 0.5 for i, n in enumerate(LENGTHS) for t in range(n)]
    assert any(unsure) and not all(unsure)


def test_a_sure_teacher_leaves_distillation_by_policy_gradient() -> None:
    batch, scores = step(), student(step())
    alone = PolicyObjective(TokenRatio(), FixedGap())
    ours = EOPD(1e9, K)
    found = graded(ours, ready(ours, batch), scores)
    expected = graded(alone, ready(alone, batch), scores)
    close(found[0], expected[0])
    close(found[1]["logprobs"], expected[1]["logprobs"])


def test_over_the_whole_vocabulary_it_adds_a_forward_kl() -> None:
    objective = EOPD(None, 5)
    found = expected_gradient(objective, LOGITS, TEACHER, BEST, **top(5))
    forward = forward_kl_gradient(S, TEACHER.tolist())
    reverse = reverse_kl_gradient(S, TEACHER.tolist())
    close(found, [a + b for a, b in zip(forward, reverse, strict=True)])


@pytest.mark.parametrize("k", [1, 3])
def test_its_second_term_by_two_identities(k: int) -> None:
    """It is KL(T~ || S~) - log S(K), and its gradient by the logits is S - T~."""
    leaf = LOGITS.clone().requires_grad_()
    rows = leaf.log_softmax(-1)
    asked = BEST[:k]
    one = torch.zeros(1, 1, dtype=torch.float64)
    scores = TokenScores(one, one, None, rows[asked][None, None])
    batch = step().select([0]).replace(teacher_topk_logprobs=TEACHER[asked][None, None])
    value = TeacherTopK(top_k=k).per_token(batch, scores, torch.ones(1, 1, dtype=torch.bool))
    teacher = log_softmax(TEACHER[asked].tolist())
    ours = log_softmax([S[v] for v in asked.tolist()])
    inside = math.log(sum(math.exp(S[v]) for v in asked.tolist()))
    close(value, [[kl(teacher, ours) - inside]])
    target = torch.zeros(5, dtype=torch.float64)
    target[asked] = torch.tensor(teacher, dtype=torch.float64).exp()
    close(torch.autograd.grad(value.sum(), leaf)[0], LOGITS.softmax(-1) - target)


@pytest.mark.parametrize("k", [2, 5])
def test_a_jensen_shannon_divergence_counts_the_rest_of_the_student(k: int) -> None:
    """Against the dense divergence of the teacher with zeros outside its K tokens."""
    asked = BEST[:k]
    one = torch.zeros(1, 1, dtype=torch.float64)
    scores = TokenScores(one, one, None, LOGITS.log_softmax(-1)[asked][None, None])
    batch = step().select([0]).replace(teacher_topk_logprobs=TEACHER[asked][None, None])
    term = TeacherTopK(jsd_beta=0.5, top_k=k)
    p = LOGITS.softmax(-1).tolist()
    t = [0.0] * 5
    for v, x in zip(asked.tolist(), log_softmax(TEACHER[asked].tolist()), strict=True):
        t[v] = math.exp(x)
    mean = [(a + b) / 2 for a, b in zip(p, t, strict=True)]
    dense = sum(
        0.5 * a * math.log(a / m) for row in (p, t) for a, m in zip(row, mean, strict=True) if a
    )
    found = term.per_token(batch, scores, torch.ones(1, 1, dtype=torch.bool))
    # With k = V, the student's rest is known up to the rounding of 1 - sum.
    close(found, [[dense]], 1e-10 if k < 5 else 1e-7)
    assert 0.0 <= found.item() <= math.log(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jsd_beta": 1.0}, "`jsd_beta` must be in"),
        ({"top_k": 0}, "`top_k` must be at least 1: got 0"),
        ({"entropy_above": -0.1}, "`entropy_above` must be at least 0: got -0.1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TeacherTopK(**settings)
