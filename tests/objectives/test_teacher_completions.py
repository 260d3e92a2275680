"""Completions that the teacher sampled: their ratio rules, and terms that do not act on them."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.objective_steps import PRESETS, REWARDS, TAUGHT, THEIRS, graded, ready, step, student
from helpers.reference import close, f64, surrogate
from kdrl_lightning.objectives import (
    GKD,
    GRPO,
    KDRL,
    RLAD,
    SFT,
    Advantage,
    BehaviorRatio,
    MaskedImportance,
    OnPolicyDistillation,
    PolicyObjective,
    Ratio,
    SampledKL,
    ShapedAdvantage,
    ShapedProbability,
    SumAdvantage,
    TokenRatio,
    TruncatedImportance,
    TrustRegionRatio,
    VerdictAdvantage,
    VocabularyKL,
)
from kdrl_lightning.objectives.base import blank

ROWS = torch.tensor(THEIRS)
WHOLE_DISTRIBUTIONS = ("kdrl-full", "kdrl-topk", "gkd", "gkd-topk", "opsd", "sdft", "sdpo", "eopd")
SAMPLED = sorted(set(TAUGHT) - {*WHOLE_DISTRIBUTIONS, "sdpo-hybrid", "srpo-published"})


def test_shaped_probability_by_hand() -> None:
    batch = step()
    objective = GRPO(teacher_tokens=ShapedProbability(0.3))
    batch = ready(objective, batch)
    scores = student(batch)
    _, gradients = graded(objective, batch, scores)
    tokens, lp = float(batch.loss_mask.sum()), scores.logprobs.tolist()
    for i in range(3, 16, 4):
        for t in range(int(batch.loss_mask[i].sum())):
            p, a = math.exp(lp[i][t]), float(batch.advantages[i])
            close(gradients["logprobs"][i, t], -a * 0.3 * p / (p + 0.3) ** 2 / tokens)


@pytest.mark.parametrize("low", [0.1, 0.4])
def test_behavior_ratio_is_to_what_the_sampler_reported(low: float) -> None:
    objective = GRPO(clip_low=0.2, teacher_tokens=BehaviorRatio(low, 0.3, 2.5))
    batch = ready(objective, step())
    scores = student(batch)
    gradient = graded(objective, batch, scores)[1]["logprobs"] * batch.loss_mask.sum()
    lp = scores.logprobs.detach()
    for i in range(16):
        rule = (low, 0.3) if THEIRS[i] else (0.2, 0.2)
        base = batch.rollout_logprobs if THEIRS[i] else batch.old_logprobs
        for t in range(int(batch.loss_mask[i].sum())):
            ratio = math.exp(lp[i, t] - base[i, t])
            a = float(batch.advantages[i])
            slope = surrogate(ratio, a, *rule)[1]
            close(gradient[i, t], 0.0 if THEIRS[i] and a < 0 and ratio > 2.5 else slope)


def test_without_a_rule_their_tokens_are_like_the_students() -> None:
    mixed, own = step(mixed=True), step(mixed=False)
    scores = student(mixed)
    for objective in (GRPO(), SFT(), GKD()):
        a, b = (graded(objective, ready(objective, x), scores) for x in (mixed, own))
        close(a[0], b[0])
        for name in a[1]:
            close(a[1][name], b[1][name])


@pytest.mark.parametrize("rule", [ShapedProbability(), BehaviorRatio()])
def test_a_rule_for_teachers_leaves_students_alone(rule: ShapedProbability | BehaviorRatio) -> None:
    own = step(mixed=False)
    scores = student(own)
    with_rule, without = GRPO(teacher_tokens=rule), GRPO()
    a, b = (graded(o, ready(o, own), scores) for o in (with_rule, without))
    close(a[0], b[0])
    mixed = step()
    a, b = (graded(o, ready(o, mixed), scores)[1]["logprobs"] for o in (with_rule, without))
    close(a[~ROWS], b[~ROWS])
    assert not torch.equal(a[ROWS], b[ROWS])


def test_advantages_compare_all_completions_of_a_prompt() -> None:
    got = ready(GRPO(teacher_tokens=ShapedProbability()), step()).advantages
    of_group = REWARDS[:4]
    mean = sum(of_group) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in of_group) / 3) + 1e-6
    close(got[:4], [(r - mean) / std for r in of_group])


@pytest.mark.parametrize("name", SAMPLED)
def test_the_teachers_opinion_acts_on_student_tokens_only(name: str) -> None:
    objective = PRESETS[name]()
    batch = ready(objective, step())
    scores = student(batch)
    for scale in (0.5, -2.0):
        moved = batch.replace(teacher_logprobs=batch.teacher_logprobs * scale)
        a, b = (graded(objective, x, scores)[1]["logprobs"] for x in (batch, moved))
        close(a[ROWS], b[ROWS])
        if name != "kdrl-shaping":  # there it acts through the advantages of `prepare`
            assert not torch.equal(a[~ROWS], b[~ROWS])
    assert not objective.imitated(batch, scores.logprobs.detach())[ROWS].any()


WHOLE = VocabularyKL(0.2, top_k=3)  # it alone imitates on the teacher's completions


@pytest.mark.parametrize(
    "objective",
    [
        PolicyObjective(TokenRatio(), SumAdvantage(0.3), WHOLE),
        PolicyObjective(TokenRatio(), VerdictAdvantage(), WHOLE),
        PolicyObjective(TokenRatio(), ShapedAdvantage(0.3), WHOLE),
        PolicyObjective(TrustRegionRatio(), Advantage(), WHOLE),
    ],
    ids=["sum", "verdict", "shaped", "trust-region"],
)
def test_a_mixture_with_whole_distributions_keeps_the_gap_off_them(
    objective: PolicyObjective,
) -> None:
    batch = step()
    moved = batch.replace(
        teacher_logprobs=torch.where(
            ROWS[:, None], batch.teacher_logprobs - 3.0, batch.teacher_logprobs
        )
    )
    scores = student(batch)
    prepared = ready(objective, batch)
    assert torch.equal(prepared.imitation_mask, batch.loss_mask)
    a, b = (graded(objective, ready(objective, x), scores) for x in (batch, moved))
    close(a[0], b[0])
    close(a[1]["logprobs"], b[1]["logprobs"])
    imitated = objective.imitated(prepared, scores.logprobs.detach())
    assert torch.equal(imitated, batch.loss_mask)  # by the divergence


def test_a_sampled_estimate_is_of_the_students_tokens_whatever_is_selected() -> None:
    batch = step()
    batch = batch.replace(imitation_mask=batch.loss_mask)
    assert torch.equal(SampledKL().where(batch), batch.student_mask)
    assert torch.equal(WHOLE.where(batch), batch.loss_mask)


def test_shaped_rewards_leave_the_teachers_own_gap_out() -> None:
    objective = PRESETS["kdrl-shaping"]()
    batch = step()
    moved = batch.replace(
        teacher_logprobs=torch.where(
            ROWS[:, None], batch.teacher_logprobs - 3.0, batch.teacher_logprobs
        )
    )
    close(objective.prepare(batch).advantages, objective.prepare(moved).advantages)


@pytest.mark.parametrize("correction", [TruncatedImportance(1.1), MaskedImportance(0.9, 1.1)])
def test_the_engine_correction_acts_on_sampled_student_tokens(
    correction: TruncatedImportance | MaskedImportance,
) -> None:
    batch = step()
    for objective in (
        KDRL(0.3, engine_correction=correction, ref_kl_coef=0.2),
        OnPolicyDistillation(engine_correction=correction),
        RLAD(engine_correction=correction),
    ):
        prepared = ready(objective, batch)
        weights = prepared.importance_weights
        assert weights is not None
        assert weights[ROWS].eq(1.0).all()
        assert weights[~prepared.loss_mask].eq(1.0).all()
        scores = student(batch)
        plain = prepared.replace(importance_weights=None)
        a, b = (graded(objective, x, scores)[1]["logprobs"] for x in (prepared, plain))
        close(a, b * weights)
        assert not torch.equal(a[~ROWS], b[~ROWS])


def test_whole_distributions_need_no_engine_correction() -> None:
    batch = step()
    for make in (
        lambda **kw: GKD(**kw),
        lambda **kw: GKD(top_k=3, **kw),
    ):
        scores = student(batch)
        objective, plain = make(engine_correction=TruncatedImportance(1.1)), make()
        a, b = (graded(o, ready(o, batch), scores) for o in (objective, plain))
        close(a[0], b[0])


def test_reference_kl_is_estimated_on_student_samples() -> None:
    objective = GRPO(ref_kl_coef=0.5)
    batch = ready(objective, step())
    terms = {t.name: t for t in objective.terms(*blank(batch, student(batch)))}
    assert torch.equal(terms["ref_kl"].mask, batch.student_mask)
    a, b = (
        graded(objective, x, student(batch))[1]["logprobs"]
        for x in (batch, batch.replace(ref_logprobs=batch.ref_logprobs - 1.0))
    )
    close(a[ROWS], b[ROWS])
    assert not torch.equal(a[~ROWS], b[~ROWS])


def test_a_teachers_token_is_dead_by_its_own_rule() -> None:
    batch = step()
    luffy, behavior = (
        GRPO(teacher_tokens=rule) for rule in (ShapedProbability(), BehaviorRatio(0.01, 0.01))
    )
    logprobs = student(batch).logprobs.detach()
    advantages = f64(torch.ones_like(logprobs))
    for objective, dead in ((luffy, False), (behavior, True)):
        got = objective.dead(ready(objective, batch), logprobs, advantages)
        assert got[ROWS].any() == dead
        assert got[~ROWS].any()
    assert not luffy.dead(batch, logprobs, -advantages)[ROWS].any()


@pytest.mark.parametrize("rule", [ShapedProbability(), BehaviorRatio()])
def test_the_rule_that_is_not_taken_cannot_spoil_a_gradient(rule: Ratio) -> None:
    objective = GRPO(teacher_tokens=rule)
    batch = ready(objective, step())
    batch = batch.replace(advantages=-batch.advantages.abs())  # no fence above
    scores = student(batch)
    far = torch.full_like(scores.logprobs, -2e3).detach()  # e^2000 is inf
    spoilt = batch.replace(
        old_logprobs=torch.where(ROWS[:, None], far, batch.old_logprobs),
        rollout_logprobs=torch.where(ROWS[:, None], batch.rollout_logprobs, far),
    )
    clean = graded(objective, batch, scores)[1]["logprobs"]
    close(graded(objective, spoilt, scores)[1]["logprobs"], clean)
