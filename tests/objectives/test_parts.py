"""Which tokens count as imitated or dead, degenerate cases, and what each preset needs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.objective_steps import (
    PRESETS,
    TAUGHT,
    graded,
    keep,
    make,
    ready,
    same,
    some_mask,
    step,
    student,
)
from helpers.reference import close, f64
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses import TokenScores
from kdrl_lightning.objectives import (
    GRPO,
    KDRL,
    RLAD,
    RLSD,
    BehaviorRatio,
    GapAdvantage,
    MaskedImportance,
    Objective,
    OnPolicyDistillation,
    PolicyObjective,
    SurrogateTerm,
    TokenRatio,
    TrustRegionRatio,
)
from kdrl_lightning.objectives.base import blank
from kdrl_lightning.rollout_batch import RolloutBatch


def gradient(objective: Objective, batch: RolloutBatch, scores: TokenScores) -> Tensor:
    """By log-probs, top-k log-probs and divergences, side by side for each token."""
    _, tables = graded(objective, batch, scores)
    tables.pop("entropy")
    return torch.cat([x if x.dim() == 3 else x[..., None] for x in tables.values()], -1)


# --- Which tokens are imitated, which are dead ---

# Shaped rewards move whole groups in `prepare`.
TOKENWISE = [n for n in PRESETS if n != "kdrl-shaping"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TOKENWISE)
def test_imitated_tokens_are_those_whose_gradient_follows_the_teacher(name: str, seed: int) -> None:
    """A teacher so near that nothing is clipped; each score moves a little."""
    batch = step(10 * seed, wide=0.02)
    objective = keep(make(name), some_mask(batch))
    batch = ready(objective, batch)
    scores = student(batch, near=0.02)
    moved = batch.replace(
        teacher_logprobs=batch.teacher_logprobs + 1e-3,
        teacher_topk_logprobs=batch.teacher_topk_logprobs * 1.01,
    )
    changed = (gradient(objective, moved, scores) != gradient(objective, batch, scores)).any(-1)
    if objective.divergence is not None:  # the teacher enters through the scores
        kl = next(t for t in objective.terms(batch, scores) if t.name == objective.distill.name)
        changed = torch.autograd.grad(kl.per_token.masked_fill(~kl.mask, 0).sum(),
                                      scores.divergence)[0] != 0  # fmt: skip
    imitated = objective.imitated(batch, scores.logprobs.detach()) & batch.loss_mask
    assert torch.equal(imitated, changed)
    assert imitated.any() == (name in TAUGHT)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [n for n in TOKENWISE if make(n).divergence is None])
def test_imitated_tokens_would_be_graded_otherwise_without_the_teacher(
    name: str, seed: int
) -> None:
    """A teacher far away: fences, clamps and clipped weights act. Alive, and changed by it."""
    batch = step(10 * seed)
    objective = keep(make(name), some_mask(batch))
    if name == "grpo+rlad":  # a token dead in one loss lives in the other
        objective.set_coefficient("rl_coef", 0.0)
    batch = ready(objective, batch)
    scores = student(batch, near=0.4)
    alone = batch.replace(imitation_mask=torch.zeros_like(batch.loss_mask))
    with_teacher = gradient(objective, batch, scores)
    changed = (with_teacher != gradient(objective, alone, scores)) & (with_teacher != 0)
    imitated = objective.imitated(batch, scores.logprobs.detach()) & batch.loss_mask
    assert torch.equal(imitated, changed.any(-1))


def test_shaped_rewards_imitate_on_every_live_token_of_the_student() -> None:
    objective = make("kdrl-shaping")
    batch = ready(objective, step())
    logprobs = student(batch, near=0.4).logprobs.detach()
    advantages = objective.token_advantages(batch, logprobs)
    dead = objective.dead(batch, logprobs, advantages)
    assert torch.equal(objective.imitated(batch, logprobs), batch.student_mask & ~dead)


def test_shaped_rewards_of_an_empty_selection_imitate_nothing() -> None:
    batch = step()
    objective = keep(make("kdrl-shaping"), torch.zeros_like(batch.loss_mask))
    batch = ready(objective, batch)
    assert not objective.imitated(batch, student(batch).logprobs.detach()).any()


@pytest.mark.parametrize("make_objective", [OnPolicyDistillation, RLAD])
def test_tokens_that_the_engine_correction_leaves_out_are_not_imitated(
    make_objective: Callable[..., Objective],
) -> None:
    objective = make_objective(engine_correction=MaskedImportance(0.9, 1.1))
    batch = ready(objective, step())
    scores = student(batch)
    imitated = objective.imitated(batch, scores.logprobs.detach())
    assert gradient(objective, batch, scores)[imitated].ne(0).any(-1).all()


@pytest.mark.parametrize("name", ["rlad", "grpo+rlad"])
def test_a_ratio_imitates_nothing_without_an_advantage(name: str) -> None:
    objective, batch = make(name), step().replace(rewards=f64([1.0] * 16))
    logprobs = student(batch).logprobs.detach()
    assert not objective.imitated(ready(objective, batch), logprobs).any()


@pytest.mark.parametrize("name", sorted(TAUGHT))
def test_nothing_is_imitated_with_all_coefficients_at_zero(name: str) -> None:
    objective = make(name)
    for coef in ("rl_coef", "distill_coef", "teacher_kl_coef"):
        try:
            objective.set_coefficient(coef, 0.0)
        except ConfigurationError as error:
            assert coef in str(error)
    batch = ready(objective, step())
    assert not objective.imitated(batch, student(batch).logprobs.detach()).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PRESETS)
def test_dead_tokens_are_those_with_an_advantage_but_no_policy_gradient(
    name: str, seed: int
) -> None:
    objective = make(name)
    batch = ready(objective, step(10 * seed))
    scores = student(batch, near=0.4)
    logprobs = scores.logprobs.detach()
    advantages = objective.token_advantages(batch, logprobs)
    dead = objective.dead(batch, logprobs, advantages) & batch.loss_mask
    shown = {t.name: t for t in objective.terms(*blank(batch, scores))}
    term = shown.get("distill_policy", shown.get("policy"))
    if term is None:
        assert not dead.any()
        return
    (slope,) = torch.autograd.grad(term.per_token.sum(), scores.logprobs)
    assert torch.equal(dead, (slope == 0) & (advantages != 0) & batch.loss_mask)
    assert dead.any() == (name not in ("cispo", "scope"))


@pytest.mark.parametrize("name", PRESETS)
def test_log_ratio_is_what_the_surrogate_scales_by(name: str) -> None:
    """Where it is alive the policy loss is -r A; CISPO's is -sg(r) A log pi instead."""
    objective = make(name)
    batch = ready(objective, step())
    scores = student(batch)
    logprobs = scores.logprobs.detach()
    terms = {t.name: t for t in objective.terms(*blank(batch, scores))}
    term = terms.get("distill_policy", terms.get("policy"))
    advantages = objective.token_advantages(batch, logprobs)
    ratio = objective.log_ratio(batch, logprobs).exp()
    if term is None:
        close(ratio, (logprobs - batch.old_logprobs).exp())
        assert advantages.eq(0).all()
        return
    weights = 1.0 if batch.importance_weights is None else batch.importance_weights
    expected = -ratio * advantages * weights
    if name == "cispo":
        expected = -ratio.clamp(max=1.28) * advantages * logprobs
    alive = batch.loss_mask & ~objective.dead(batch, logprobs, advantages)
    close(term.per_token[alive], expected[alive])


BOUNDS = {"dapo": (0.8, 1.28), "gspo": (0.9, 1.15), "cispo": (0.0, 1.28)}
BOUNDS |= {"srpo-published": (0.8, 1.28), "scope": (0.0, math.inf)}


@pytest.mark.parametrize("name", PRESETS)
def test_outside_is_where_the_ratio_leaves_its_range(name: str) -> None:
    objective = make(name)
    batch = ready(objective, step())
    logprobs = student(batch, near=0.5).logprobs.detach()
    got = objective.outside(batch, logprobs)
    if getattr(objective, "ratio", None) is None:
        assert got is None
        return
    assert got is not None
    low, high = BOUNDS.get(name, (0.8, 1.2))
    ratio = objective.log_ratio(batch, logprobs).exp()
    below, above = ratio < low, ratio > high
    if name == "luffy":  # unclipped
        above &= batch.student_mask
        below &= batch.student_mask
    used = batch.loss_mask
    assert torch.equal(got[0] & used, below & used)
    assert torch.equal(got[1] & used, above & used)
    assert (below & used).any() == (name not in ("cispo", "scope"))
    assert (above & used).any() == (name != "scope")


def test_outside_goes_by_who_sampled_the_token() -> None:
    objective = GRPO(0.1, 0.1, teacher_tokens=BehaviorRatio(0.9, 9.0))
    batch = ready(objective, step())
    logprobs = student(batch, near=0.3).logprobs.detach()
    got = objective.outside(batch, logprobs)
    assert got is not None
    theirs = batch.loss_mask & ~batch.student_mask
    ratio = (logprobs - batch.rollout_logprobs).exp()
    assert not (got[0] | got[1])[theirs & (ratio > 0.1) & (ratio < 10)].any()
    assert got[0][batch.student_mask].any() and got[1][batch.student_mask].any()


# --- Degenerate cases ---


@pytest.mark.parametrize("near", [0.0, 0.3])
def test_old_student_as_teacher_makes_trrd_grpo(near: float) -> None:
    batch = step()
    batch = batch.replace(teacher_logprobs=batch.old_logprobs)
    for alpha in (0.0, 0.5):
        same(RLAD(alpha, None), GRPO(), batch, near)


@pytest.mark.parametrize(
    "name", ["kdrl", "kdrl-weighted", "kdrl-k3", "kdrl-pg", "kdrl-advantage", "rlsd"]
)
def test_student_as_teacher_adds_no_gradient(name: str) -> None:
    batch = step()
    scores = student(batch)
    batch = batch.replace(teacher_logprobs=scores.logprobs.detach())
    got, expected = (
        graded(o, ready(o, batch), scores)[1]["logprobs"] for o in (make(name), GRPO())
    )
    close(got, expected)


@pytest.mark.parametrize(
    "make_kdrl",
    [
        lambda: KDRL(0.0),
        lambda: KDRL(0.0, kl_estimator="k3"),
        lambda: KDRL(0.0, form="advantage"),
        lambda: KDRL(0.0, form="reward_shaping"),
        lambda: RLAD(1.0),
        lambda: RLAD(offset_clamp=0.0),
        lambda: RLSD(mix=0.0),
        lambda: RLSD(width=0.0),
        lambda: GRPO(distill=SurrogateTerm(TrustRegionRatio(), 0.0)),
        lambda: GRPO(rl_coef=0.4, distill=SurrogateTerm(TrustRegionRatio(1.0), 0.6)),
    ],
)
@pytest.mark.parametrize("near", [0.0, 0.3])
def test_without_the_teachers_weight_it_is_grpo(
    make_kdrl: Callable[[], Objective], near: float
) -> None:
    same(make_kdrl(), GRPO(), step(), near)


def test_alpha_one_is_grpo_bit_for_bit() -> None:
    batch = step()
    scores = student(batch)
    a, b = (
        graded(o, ready(o, batch), scores) for o in (RLAD(1.0, dual_clip=2.0), GRPO(dual_clip=2.0))
    )
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1]["logprobs"], b[1]["logprobs"])


@pytest.mark.parametrize("coef", [1e-30, 0.5])
def test_trrd_needs_an_advantage_and_kdrl_does_not(coef: float) -> None:
    batch = step().replace(rewards=f64([1.0] * 16))
    scores = student(batch)
    for objective, alive in ((RLAD(), False), (RLSD(), False), (KDRL(coef), True)):
        prepared = ready(objective, batch)
        assert graded(objective, prepared, scores)[1]["logprobs"].ne(0).any() == alive
        assert objective.imitated(prepared, scores.logprobs.detach()).any() == alive


# --- What they need ---

DISTILLED = ("opsd", "sdft", "sdpo", "gopd", "eopd")


def test_what_each_preset_needs() -> None:
    for name in PRESETS:
        objective = make(name)
        assert objective.needs_teacher == (name in TAUGHT)
        assert objective.needs_reference == (name in ("reference", "gopd"))
        assert objective.takes_teacher_completions == (
            name in ("luffy", "behavior", "sft", "sft-correct", "gkd", "gkd-topk")
        )
        alone = name.startswith(("opd", "gkd", "sft")) or name in DISTILLED
        assert objective.needs_groups == (not alone)
        full = ("gkd", "kdrl-full", "opsd", "sdft")
        assert (objective.divergence is not None) == (name in full)
        own = ("sdpo", "sdpo-hybrid", "srpo-published")
        assert objective.top_k == (3 if name.endswith("topk") or name in own else 0)
        assert objective.teacher_top_k == (3 if name == "eopd" else 0)
    assert not PolicyObjective(TokenRatio(), GapAdvantage()).needs_groups
