"""Each method of the family against a slow reference written from its row of the table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from helpers.objective_rows import (
    LENGTHS,
    ROWS,
    clipped,
    grpo,
    k2,
    k3,
    plus,
    rlsd,
    scaled,
    slow,
    tables,
)
from helpers.objective_steps import CORRECT as C
from helpers.objective_steps import (
    GROUPS,
    MAX_TOKENS,
    PRESETS,
    REDUCTIONS,
    THEIRS,
    K,
    graded,
    ready,
    step,
    student,
)
from helpers.reference import close, f64, surrogate, token_weights, trrd_ratio
from kdrl_lightning.losses import TokenScores
from kdrl_lightning.objectives import (
    GRPO,
    KDRL,
    RLAD,
    RLSD,
    ClippedDistillation,
    DistillTerm,
    GapAdvantage,
    MaskedImportance,
    OnPolicyDistillation,
    PolicyObjective,
    SampledKL,
    SumAdvantage,
    SurrogateTerm,
    TokenRatio,
    TruncatedImportance,
    TrustRegionRatio,
    VocabularyKL,
    WrongCompletions,
)


@pytest.mark.parametrize("near", [0.0, 0.3], ids=["first-update", "later-update"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ROWS)
def test_method_matches_its_row(name: str, reduction: Any, near: float) -> None:
    objective = PRESETS[name](reduction=reduction)
    batch = ready(objective, step())
    scores = student(batch, near=near)
    x = tables(batch, scores)
    loss, gradients = graded(objective, batch, scores)
    value, gradient = slow(reduction, lambda i, t: ROWS[name](x, i, t))
    close(loss, value)
    close(gradients["logprobs"], gradient)
    assert gradients["entropy"].eq(0).all()


@pytest.mark.parametrize("near", [0.0, 0.3])
def test_distillation_with_a_clip_has_a_name(near: float) -> None:
    """At the first update its gradient is k2's; later the clip stops what has moved far enough."""
    batch, scores = step(mixed=False), student(step(mixed=False), near=near)
    named, parts = ClippedDistillation(), PolicyObjective(TokenRatio(), GapAdvantage())
    got, expected, k2_ = (
        graded(objective, ready(objective, batch), scores)
        for objective in (named, parts, OnPolicyDistillation())
    )
    close(got[0], expected[0])
    close(got[1]["logprobs"], expected[1]["logprobs"])
    same_as_k2 = torch.allclose(got[1]["logprobs"], k2_[1]["logprobs"])
    assert same_as_k2 is (near == 0.0)


def test_every_preset_is_compared() -> None:
    apart = {"gspo", "sft-correct", "kdrl-full", "kdrl-topk", "kdrl-per-token", "gkd", "gkd-topk"}
    methods = {"eopd", "opsd", "sdpo", "sdpo-hybrid", "sdft", "srpo-published"}
    assert ROWS.keys() | apart | methods == PRESETS.keys()


@pytest.mark.parametrize("near", [0.0, 0.3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gspo_has_one_ratio_per_completion(reduction: Any, near: float) -> None:
    objective = PRESETS["gspo"](reduction=reduction)
    batch = ready(objective, step())
    scores = student(batch, near=near)
    x = tables(batch, scores)
    pairs = []
    for i, n in enumerate(LENGTHS):
        now, old = sum(x.lp[i][:n]), sum(x.old[i][:n])
        s = (math.exp(now) / math.exp(old)) ** (1 / n) if n else 1.0
        pairs.append(surrogate(s, x.A[i], 0.1, 0.15))
    # s depends on each of its n tokens with weight 1 / n, and n tokens carry the row's loss.
    value, gradient = slow(reduction, lambda i, t: pairs[i])
    loss, gradients = graded(objective, batch, scores)
    close(loss, value)
    close(gradients["logprobs"], gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "coef"), [("kdrl-full", 0.3), ("gkd", 1.0)])
def test_full_vocabulary_divergence_counts_on_every_completion(
    name: str, coef: float, reduction: Any
) -> None:
    objective = PRESETS[name](reduction=reduction)
    batch = ready(objective, step())
    scores = student(batch)
    x, given = tables(batch, scores), scores.divergence.tolist()
    loss, gradients = graded(objective, batch, scores)
    value, gradient = slow(reduction, lambda i, t: (coef * given[i][t], coef))
    rl = slow(reduction, lambda i, t: grpo(x, i, t)) if name == "kdrl-full" else (0.0, 0 * gradient)
    close(loss, value + rl[0])
    close(gradients["divergence"], gradient)
    close(gradients["logprobs"], rl[1])


@pytest.mark.parametrize(("name", "coef"), [("kdrl-topk", 0.3), ("gkd-topk", 1.0)])
def test_top_k_divergence_is_over_k_tokens_and_the_rest(name: str, coef: float) -> None:
    objective = PRESETS[name]()
    batch = ready(objective, step())
    scores = student(batch)
    x = tables(batch, scores)
    student_k, teacher_k = scores.topk_logprobs.tolist(), batch.teacher_topk_logprobs.tolist()

    def divergence(p: list[float], q: list[float]) -> tuple[float, float]:
        if name == "kdrl-topk":  # KL(S || T)
            return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), 0.0
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return sum(
            0.5 * a * math.log(a / c) + 0.5 * b * math.log(b / c)
            for a, b, c in zip(p, q, m, strict=True)
        ), 0.0

    def token(i: int, t: int) -> tuple[float, float]:
        p, q = ([math.exp(y) for y in table[i][t]] for table in (student_k, teacher_k))
        return scaled(coef, divergence([*p, 1 - sum(p)], [*q, 1 - sum(q)]))

    value, _ = slow("token_mean", token)
    rl = slow("token_mean", lambda i, t: grpo(x, i, t))[0] if name == "kdrl-topk" else 0.0
    loss, gradients = graded(objective, batch, scores)
    close(loss, value + rl)
    assert gradients["topk_logprobs"].shape[-1] == K
    assert gradients["topk_logprobs"][batch.loss_mask].ne(0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_correct_keeps_the_accepted_completions(reduction: Any) -> None:
    objective = PRESETS["sft-correct"](reduction=reduction)
    batch = ready(objective, step())
    kept = [n if c else 0 for n, c in zip(LENGTHS, C, strict=True)]
    weights = token_weights(kept, GROUPS, reduction, MAX_TOKENS)
    assert batch.loss_mask.sum(1).tolist() == kept
    scores = student(batch)
    loss, gradients = graded(objective, batch, scores)
    lp = scores.logprobs.tolist()
    close(loss, -sum(weights[i] * lp[i][t] for i, n in enumerate(kept) for t in range(n)))
    expected = torch.zeros_like(gradients["logprobs"])
    for i, n in enumerate(kept):
        expected[i, :n] = -weights[i]
    close(gradients["logprobs"], expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_per_imitated_token_divides_by_the_steps_imitated_tokens(reduction: Any) -> None:
    objective = KDRL(
        0.3, kd_per_imitated_token=True, reduction=reduction, selection=[WrongCompletions()]
    )
    batch = ready(objective, step(mixed=False))
    scores = student(batch)
    lp, teacher = scores.logprobs.tolist(), batch.teacher_logprobs.tolist()
    x = tables(batch, scores)
    imitated = sum(n for n, c in zip(LENGTHS, C, strict=True) if not c)
    assert batch.totals.num_imitated_tokens == imitated

    def token(i: int, t: int) -> tuple[float, float]:
        d = teacher[i][t] - lp[i][t]
        return (0.0, 0.0) if C[i] else (0.3 * d**2 / 2, -0.3 * d)

    kd, rl = slow(reduction, token, imitated), slow(reduction, lambda i, t: grpo(x, i, t))
    loss, gradients = graded(objective, batch, scores)
    close(loss, kd[0] + rl[0])
    close(gradients["logprobs"], kd[1] + rl[1])


def test_masked_importance_leaves_out_what_disagrees() -> None:
    objective = GRPO(engine_correction=MaskedImportance(0.7, 1.5))
    batch = ready(objective, step())
    scores = student(batch)
    x = tables(batch, scores)

    def token(i: int, t: int) -> tuple[float, float]:
        kept = THEIRS[i] or 0.7 <= math.exp(x.old[i][t] - x.mu[i][t]) <= 1.5
        return scaled(float(kept), grpo(x, i, t))

    value, gradient = slow("token_mean", token)
    loss, gradients = graded(objective, batch, scores)
    close(loss, value)
    close(gradients["logprobs"], gradient)
    assert 0 < (gradient[batch.student_mask] == 0).sum() < batch.student_mask.sum()


@pytest.mark.parametrize("rl_coef", [0.0, 0.4])
def test_rl_coef_weights_the_policy_loss_only(rl_coef: float) -> None:
    objective = KDRL(0.3, rl_coef=rl_coef, ref_kl_coef=0.2, entropy_coef=0.1)
    batch = ready(objective, step())
    scores = student(batch)
    x, entropy = tables(batch, scores), scores.entropy.tolist()

    def token(i: int, t: int) -> tuple[float, float]:
        ref = scaled(0.0 if THEIRS[i] else 0.2, k3(x.ref[i][t] - x.lp[i][t]))
        kd = plus(k2(x, i, t, 0.3), (-0.1 * entropy[i][t], 0.0))
        return plus(scaled(rl_coef, grpo(x, i, t)), plus(ref, kd))

    value, gradient = slow("token_mean", token)
    loss, gradients = graded(objective, batch, scores)
    close(loss, value)
    close(gradients["logprobs"], gradient)
    close(gradients["entropy"], slow("token_mean", lambda i, t: (0.0, -0.1))[1])


@pytest.mark.parametrize(("reward_coef", "kl_coef"), [(0.0, 1.0), (1.0, 0.0), (0.6, 0.4)])
def test_opd_then_rl_moves_from_d_to_a(reward_coef: float, kl_coef: float) -> None:
    objective = PolicyObjective(TokenRatio(), SumAdvantage())
    objective.set_coefficient("reward_coef", reward_coef)
    objective.set_coefficient("teacher_kl_coef", kl_coef)
    batch = ready(objective, step())
    scores = student(batch)
    x = tables(batch, scores)
    value, gradient = slow(
        "token_mean",
        lambda i, t: clipped(x.rho(i, t), reward_coef * x.A[i] + kl_coef * x.d(i, t)),
    )
    loss, gradients = graded(objective, batch, scores)
    close(loss, value)
    close(gradients["logprobs"], gradient)


@pytest.mark.parametrize(("mix", "width"), [(0.0, 0.2), (1.0, 0.1), (0.3, 0.6)])
def test_rlsd_mix_and_width(mix: float, width: float) -> None:
    objective = RLSD(mix, width, clip_low=0.1, clip_high=0.3)
    batch = ready(objective, step())
    scores = student(batch)
    x = tables(batch, scores)
    value, gradient = slow(
        "token_mean",
        lambda i, t: clipped(x.rho(i, t), rlsd(x, i, t, mix, width), 0.1, 0.3),
    )
    loss, gradients = graded(objective, batch, scores)
    close(loss, value)
    close(gradients["logprobs"], gradient)


def test_a_mixture_by_hand_is_the_sum_of_its_parts() -> None:
    """TRRD's ratio with KDRL's advantage: r of the first, A + beta d of the second."""
    objective = PolicyObjective(
        TrustRegionRatio(0.3, None, 0.1, 0.25, log_ratio_clamp=None), SumAdvantage(0.3)
    )
    batch = ready(objective, step())
    scores = student(batch)
    x = tables(batch, scores)

    def token(i: int, t: int) -> tuple[float, float]:
        teacher = x.old[i][t] if THEIRS[i] else x.teacher[i][t]
        ratio = trrd_ratio(x.lp[i][t], x.old[i][t], teacher, 0.3)
        return clipped(ratio, x.A[i] + 0.3 * x.d(i, t), 0.1, 0.25)

    value, gradient = slow("token_mean", token)
    loss, gradients = graded(objective, batch, scores)
    close(loss, value)
    close(gradients["logprobs"], gradient)


def test_two_losses_weighted_are_the_sum_of_two_objectives() -> None:
    """GRPO's loss and RLAD's, each with the engine's weights, against one objective with both."""
    weights: Any = {"engine_correction": TruncatedImportance(1.2)}
    both = GRPO(rl_coef=0.5, distill=SurrogateTerm(TrustRegionRatio(0.3), 2.0), **weights)
    batch, scores = step(), student(step())
    found, one, other = (
        graded(o, ready(o, batch), scores) for o in (both, GRPO(**weights), RLAD(0.3, **weights))
    )
    assert (ready(both, batch).importance_weights != 1).any()
    close(found[0], 0.5 * one[0] + 2.0 * other[0])
    close(found[1]["logprobs"], 0.5 * one[1]["logprobs"] + 2.0 * other[1]["logprobs"])


@pytest.mark.parametrize(
    ("named", "term"),
    [
        (KDRL(0.3), SampledKL(0.3)),
        (KDRL(0.3, True), SampledKL(0.3, ratio_weight=True)),
        (KDRL(0.3, kl_estimator="k3"), SampledKL(0.3, "k3")),
        (KDRL(0.3, kl_estimator="full_vocabulary"), VocabularyKL(0.3)),
        (KDRL(0.3, kl_estimator="top_k", kd_top_k=K), VocabularyKL(0.3, top_k=K)),
        (KDRL(0.3, kd_per_imitated_token=True), SampledKL(0.3, per_imitated_token=True)),
    ],
)
def test_a_term_by_name_is_the_term(named: KDRL, term: DistillTerm) -> None:
    batch, scores = step(), student(step())
    expected = graded(named, ready(named, batch), scores)
    found = graded(given := KDRL(distill=term), ready(given, batch), scores)
    close(found[0], expected[0])
    for name, gradient in expected[1].items():
        close(found[1][name], gradient)


def test_distillation_as_k2_and_as_a_gap_have_one_gradient_at_ratio_one() -> None:
    joint, gap = OnPolicyDistillation(), PolicyObjective(TokenRatio(), GapAdvantage())
    batch = step()
    scores = student(batch, near=0.0)
    close(
        graded(joint, ready(joint, batch), scores)[1]["logprobs"],
        graded(gap, ready(gap, batch), scores)[1]["logprobs"],
    )


def merged(student: list[float], teacher: list[float], beta: float) -> float:
    """The divergence of few probabilities, by its definition."""
    pairs = list(zip(student, teacher, strict=True))

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)

    if beta in (0.0, 1.0):
        return kl(student, teacher) if beta else kl(teacher, student)
    mean = [(1 - beta) * a + beta * b for a, b in pairs]
    return beta * kl(teacher, mean) + (1 - beta) * kl(student, mean)


def whole(**fields: Any) -> tuple[Any, TokenScores]:
    """One token, of which the student names K."""
    batch = step().select([0]).replace(**{n: f64(v) for n, v in fields.items() if "teacher" in n})
    scores = {n: f64(v) for n, v in fields.items() if "teacher" not in n}
    empty = torch.zeros(1, 1, dtype=torch.float64)
    return batch, TokenScores(empty, empty, **scores)


MASK = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_tail_counts_as_it_was_scored(beta: float) -> None:
    p, q = [0.7, 0.3 - 9e-13, 9e-13], [0.5, 0.5 - 2e-13, 2e-13]
    batch, scores = whole(
        topk_logprobs=[[[math.log(x) for x in p[:2]]]],
        tail_logprobs=[[math.log(p[2])]],
        teacher_topk_logprobs=[[[math.log(x) for x in q[:2]]]],
        teacher_tail_logprobs=[[math.log(q[2])]],
    )
    loss = VocabularyKL(1.0, beta, 2).per_token(batch, scores, MASK)
    close(loss[0, 0], merged(p, q, beta))
    scores.tail_logprobs.requires_grad_()
    loss = VocabularyKL(1.0, 0.0, 2).per_token(batch, scores, MASK)
    (slope,) = torch.autograd.grad(loss.sum(), scores.tail_logprobs)
    close(slope[0, 0] / (p[2] - q[2]), 1.0, 1e-3)  # of KL(T || S): p - q


@pytest.mark.parametrize("tail", [[[-math.inf]], [[math.log(0.5)]]])
def test_a_teacher_that_excludes_a_token_is_floored_among_the_top_k(tail: Any) -> None:
    """A tail that the teacher excludes, too."""
    batch, scores = whole(
        topk_logprobs=[[[math.log(0.5), math.log(0.25)]]],
        tail_logprobs=[[math.log(0.25)]],
        teacher_topk_logprobs=[[[0.0 if tail[0][0] < -9 else math.log(0.5), -math.inf]]],
        teacher_tail_logprobs=tail,
    )
    loss = VocabularyKL(1.0, 1.0, 2).per_token(batch, scores, MASK)
    teacher = [math.exp(max(x, -30.0)) for x in (*batch.teacher_topk_logprobs[0, 0], tail[0][0])]
    close(loss[0, 0], merged([0.5, 0.25, 0.25], [x / sum(teacher) for x in teacher], 1.0))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("known", [True, False])
def test_nothing_is_compared_in_a_tail_without_tokens(beta: float, known: bool) -> None:
    """All tokens are among the K; a teacher behind a server does not know its tail."""
    p, q = [0.7, 0.3], [0.5, 0.5]
    fields: dict[str, Any] = {"teacher_tail_logprobs": [[-math.inf]]} if known else {}
    batch, scores = whole(
        topk_logprobs=[[[math.log(x) for x in p]]],
        tail_logprobs=[[-math.inf]],
        teacher_topk_logprobs=[[[math.log(x) for x in q]]],
        **fields,
    )
    scores.topk_logprobs.requires_grad_()
    loss = VocabularyKL(1.0, beta, 2).per_token(batch, scores, MASK)
    close(loss[0, 0], merged(p, q, beta))
    (slope,) = torch.autograd.grad(loss.sum(), scores.topk_logprobs)
    assert slope.isfinite().all() and slope.ne(0).all()
