"""Objectives on whole optimizer steps: identities, slow references, cuts, padding, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import objective_steps
from helpers.objective_steps import some_mask, widen
from helpers.reference import close, f64, normal, surrogate, token_weights, trrd_ratio
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import (
    GRPO,
    KDRL,
    RLAD,
    SFT,
    Objective,
    OnPolicyDistillation,
    SampledKL,
    Term,
    TokenScores,
    TrustRegionRatio,
)
from kdrl_lightning.rollout_batch import RolloutBatch, collate

REDUCTIONS: list[Any] = ["token_mean", "sequence_mean", "constant_length", "group_token_mean"]
V, PAD, MAX_TOKENS = 5, 0, 9
PROMPTS = [[1, 2], [1, 2], [3], [3], [4, 4, 1], [4, 4, 1], [2, 1], [2, 1]]
COMPLETIONS = [[1, 2, 3], [4], [2, 2, 1, 3, 4], [1, 1], [3, 4, 1, 2], [1], [2, 3], [4, 4, 4]]
GROUPS = [0, 0, 3, 3, 1, 1, 7, 7]
REWARDS = [1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.0, 1.0]
CUT = [False, False, False, True, False, False, True, True]  # two of these make a group


def make_batch(seed: int = 0, width: int | None = None) -> RolloutBatch:
    """A scored step of eight completions, float64, three of them left out of the loss."""
    batch = collate(
        PROMPTS,
        COMPLETIONS,
        GROUPS,
        pad_id=PAD,
        rewards=REWARDS,
        correct=[r == 1.0 for r in REWARDS],
        truncated=CUT,
        mask_truncated=True,
    )
    shape, mask = batch.completion_ids.shape, batch.completion_mask
    old = (-normal(*shape, seed=seed).abs() - 0.1) * mask
    teacher = (old + normal(*shape, seed=seed + 1)) * mask
    batch = batch.replace(
        rewards=batch.rewards.double(), old_logprobs=old, teacher_logprobs=teacher
    )
    batch = batch.replace(
        advantages=normal(len(batch), seed=seed + 2),
        imitation_mask=batch.loss_mask,
        totals=batch.count(MAX_TOKENS),
    )
    return batch if width is None else widen(batch, width)


def student(batch: RolloutBatch, seed: int = 5, near: float = 0.3) -> TokenScores:
    """A leaf table of log-probs near the old ones, and one of entropies."""
    logprobs = batch.old_logprobs + normal(*batch.loss_mask.shape, seed=seed, scale=near)
    entropy = normal(*batch.loss_mask.shape, seed=seed + 1).abs()
    return TokenScores(logprobs.requires_grad_(), entropy.requires_grad_())


def at_rollout(batch: RolloutBatch) -> TokenScores:
    """The student of the first update, ratio 1."""
    return student(batch, near=0.0)


def graded(
    objective: Objective, batch: RolloutBatch, scores: TokenScores
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient by the log-probs, and the terms' shares."""
    loss, shares = objective(batch, scores)
    (gradient,) = torch.autograd.grad(loss, scores.logprobs)
    return loss.detach(), gradient, shares


def same(a: tuple[Tensor, Tensor, Any], b: tuple[Tensor, Tensor, Any]) -> None:
    close(a[0], b[0])
    close(a[1], b[1])


def slow(
    batch: RolloutBatch,
    reduction: str,
    token: Callable[[int, int], tuple[float, float]],
    mask: Tensor | None = None,
) -> tuple[float, Tensor]:
    """Loss and gradient, token by token; weights from the loss tokens, sum over ``mask``."""
    lengths = [0 if cut else len(c) for c, cut in zip(COMPLETIONS, CUT, strict=True)]
    weights = token_weights(lengths, GROUPS, reduction, MAX_TOKENS)
    value, gradient = 0.0, torch.zeros(batch.loss_mask.shape, dtype=torch.float64)
    for i, n in enumerate(lengths):
        for t in range(n):
            if mask is None or mask[i, t]:
                loss, slope = token(i, t)
                value += weights[i] * loss
                gradient[i, t] = weights[i] * slope
    return value, gradient


ALL = [
    GRPO,
    lambda **kw: KDRL(0.3, **kw),
    lambda **kw: KDRL(0.3, True, **kw),
    RLAD,
    lambda **kw: OnPolicyDistillation(0.7, **kw),
    lambda **kw: OnPolicyDistillation(0.7, True, **kw),
    SFT,
]
NAMES = ["grpo", "kdrl", "kdrl-weighted", "rlad", "opd", "opd-weighted", "sft"]
every_objective = pytest.mark.parametrize("make", ALL, ids=NAMES)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@every_reduction
def test_grpo_matches_slow_reference(reduction: Any) -> None:
    batch = make_batch()
    scores = student(batch)
    lp, old, a = (x.tolist() for x in (scores.logprobs, batch.old_logprobs, batch.advantages))
    got = graded(GRPO(0.2, 0.28, reduction=reduction), batch, scores)
    value, gradient = slow(
        batch, reduction, lambda i, t: surrogate(math.exp(lp[i][t] - old[i][t]), a[i], 0.2, 0.28)
    )
    close(got[0], value)
    close(got[1], gradient)


@every_reduction
@pytest.mark.parametrize("clamp", [None, 1.0])
def test_rlad_matches_slow_reference(reduction: Any, clamp: float | None) -> None:
    batch = make_batch()
    scores = student(batch)
    lp, old, teacher, a = (
        x.tolist()
        for x in (scores.logprobs, batch.old_logprobs, batch.teacher_logprobs, batch.advantages)
    )
    got = graded(
        RLAD(0.3, clamp, 0.1, 0.25, log_ratio_clamp=None, reduction=reduction), batch, scores
    )
    value, gradient = slow(
        batch,
        reduction,
        lambda i, t: surrogate(
            trrd_ratio(lp[i][t], old[i][t], teacher[i][t], 0.3, clamp), a[i], 0.1, 0.25
        ),
    )
    close(got[0], value)
    close(got[1], gradient)


@every_reduction
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_kdrl_and_distillation_match_slow_reference(
    reduction: Any, weighted: bool, masked: bool
) -> None:
    batch = make_batch()
    mask = some_mask(batch) if masked else batch.loss_mask
    batch = batch.replace(imitation_mask=mask)
    scores = student(batch)
    lp, old, teacher, a = (
        x.tolist()
        for x in (scores.logprobs, batch.old_logprobs, batch.teacher_logprobs, batch.advantages)
    )

    def policy(i: int, t: int) -> tuple[float, float]:
        return surrogate(math.exp(lp[i][t] - old[i][t]), a[i], 0.2, 0.2)

    def distill(i: int, t: int) -> tuple[float, float]:
        gap = teacher[i][t] - lp[i][t]
        weight = math.exp(lp[i][t] - old[i][t]) if weighted else 1.0
        return weight * gap**2 / 2, -weight * gap

    rl, rl_gradient = slow(batch, reduction, policy)
    kd, kd_gradient = slow(batch, reduction, distill, mask)
    got = graded(KDRL(0.3, weighted, reduction=reduction), batch, scores)
    close(got[0], rl + 0.3 * kd)
    close(got[1], rl_gradient + 0.3 * kd_gradient)
    close(got[2]["policy"], rl)
    close(got[2]["teacher_kl"], kd)  # without the coefficient
    got = graded(OnPolicyDistillation(0.7, weighted, reduction=reduction), batch, scores)
    close(got[0], 0.7 * kd)
    close(got[1], 0.7 * kd_gradient)
    close(got[2]["teacher_kl"], kd)


@every_reduction
def test_sft_is_cross_entropy(reduction: Any) -> None:
    batch = make_batch()
    scores = student(batch)
    lp = scores.logprobs.tolist()
    got = graded(SFT(reduction=reduction), batch, scores)
    value, gradient = slow(batch, reduction, lambda i, t: (-lp[i][t], -1.0))
    close(got[0], value)
    close(got[1], gradient)


def test_sft_token_mean_is_torchs_cross_entropy() -> None:
    batch = make_batch()
    logits = normal(*batch.completion_ids.shape, V, seed=3)
    logprobs = logits.log_softmax(-1).gather(-1, batch.completion_ids[..., None])[..., 0]
    loss, _ = SFT()(batch, TokenScores(logprobs, logprobs))
    targets = batch.completion_ids.masked_fill(~batch.loss_mask, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    close(loss, expected)


@every_reduction
@every_objective
def test_entropy_bonus_raises_entropy(make: Callable[..., Objective], reduction: Any) -> None:
    batch = make_batch()
    scores = student(batch)
    plain, _ = make(reduction=reduction)(batch, scores)
    loss, shares = make(reduction=reduction, entropy_coef=0.3)(batch, scores)
    entropy = scores.entropy.tolist()
    bonus, gradient = slow(batch, reduction, lambda i, t: (-entropy[i][t], -1.0))
    close(loss - plain, 0.3 * bonus)
    close(shares["entropy"], bonus)
    (got,) = torch.autograd.grad(loss, scores.entropy)
    close(got, 0.3 * gradient)


@every_reduction
def test_kdrl_without_coefficient_is_grpo(reduction: Any) -> None:
    batch = make_batch()
    scores = student(batch)
    same(
        graded(KDRL(0.0, reduction=reduction), batch, scores),
        graded(GRPO(reduction=reduction), batch, scores),
    )


@every_reduction
def test_rlad_with_alpha_one_is_grpo_bit_for_bit(reduction: Any) -> None:
    batch = make_batch()
    scores = student(batch)
    got = graded(RLAD(1.0, clip_high=0.28, reduction=reduction), batch, scores)
    expected = graded(GRPO(clip_high=0.28, reduction=reduction), batch, scores)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_rlad_with_the_old_student_as_teacher_is_grpo() -> None:
    batch = make_batch()
    scores = student(batch)
    batch = batch.replace(teacher_logprobs=batch.old_logprobs)
    same(graded(RLAD(), batch, scores), graded(GRPO(), batch, scores))


@pytest.mark.parametrize("weighted", [False, True])
def test_teacher_equal_to_student_adds_no_gradient(weighted: bool) -> None:
    batch = make_batch()
    scores = student(batch)
    batch = batch.replace(teacher_logprobs=scores.logprobs.detach())
    same(graded(KDRL(5.0, weighted), batch, scores), graded(GRPO(), batch, scores))
    assert graded(OnPolicyDistillation(1.0, weighted), batch, scores)[1].eq(0).all()


@every_reduction
@pytest.mark.parametrize("weighted", [False, True])
def test_kdrl_is_a_policy_gradient_with_shaped_advantage_at_ratio_one(
    reduction: Any, weighted: bool
) -> None:
    batch = make_batch()
    scores = at_rollout(batch)
    gap = batch.teacher_logprobs - scores.logprobs.detach()
    shaped = batch.replace(advantages=batch.advantages[:, None] + 0.3 * gap)
    close(
        graded(KDRL(0.3, weighted, reduction=reduction), batch, scores)[1],
        graded(GRPO(reduction=reduction), shaped, scores)[1],
    )


def test_ratio_weight_multiplies_the_kl_gradient_by_the_ratio() -> None:
    batch = make_batch()
    scores = student(batch)
    ratio = (scores.logprobs - batch.old_logprobs).exp().detach()
    plain = graded(OnPolicyDistillation(), batch, scores)
    weighted = graded(OnPolicyDistillation(kd_ratio_weight=True), batch, scores)
    close(weighted[1], plain[1] * ratio)
    grpo = graded(GRPO(), batch, scores)[1]
    close(
        graded(KDRL(0.3, True), batch, scores)[1] - grpo,
        (graded(KDRL(0.3), batch, scores)[1] - grpo) * ratio,
    )


def test_zero_advantage_leaves_rlad_without_gradient_and_kdrl_with_the_teacher() -> None:
    batch = make_batch().replace(advantages=torch.zeros(8, dtype=torch.float64))
    scores = student(batch)
    assert graded(RLAD(log_ratio_clamp=None), batch, scores)[1].eq(0).all()
    close(graded(KDRL(0.7), batch, scores)[1], graded(OnPolicyDistillation(0.7), batch, scores)[1])


@every_reduction
@pytest.mark.parametrize("make", ALL[1:3] + ALL[4:6], ids=[*NAMES[1:3], *NAMES[4:6]])
def test_empty_imitation_mask_leaves_no_teacher(
    make: Callable[..., Objective], reduction: Any
) -> None:
    batch = make_batch()
    batch = batch.replace(imitation_mask=torch.zeros_like(batch.loss_mask))
    _, gradient, shares = graded(make(reduction=reduction), batch, scores := student(batch))
    assert shares["teacher_kl"] == 0
    if "policy" in shares:
        close(gradient, graded(GRPO(reduction=reduction), batch, scores)[1])
    else:
        assert gradient.eq(0).all()


class Count(Objective):
    """Counts 1 on each token, wherever its mask is true."""

    def __init__(self, mask: Tensor | None, reduction: Any) -> None:
        super().__init__(reduction)
        self.mask = mask

    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        yield Term("one", torch.ones_like(scores.logprobs) + 0.0 * scores.logprobs, 2.0, self.mask)


@every_reduction
@pytest.mark.parametrize("masked", ["nowhere", "everywhere", "some"])
def test_a_terms_mask_acts_within_the_loss_tokens_and_leaves_the_denominator(
    reduction: Any, masked: str
) -> None:
    batch = make_batch()
    mask = {
        "nowhere": None,
        "everywhere": torch.ones_like(batch.loss_mask),
        "some": some_mask(batch),
    }[masked]
    loss, shares = Count(mask, reduction)(batch, student(batch))
    value, _ = slow(batch, reduction, lambda i, t: (1.0, 0.0), mask)
    close(loss, 2.0 * value)
    close(shares["one"], value)


# --- Cuts, order, padding ---


def embedding_scores(_: Objective, batch: RolloutBatch, table: Tensor) -> TokenScores:
    """A bigram model: row ``previous token`` of the table holds the next token's logits."""
    places = batch.prompt_lengths[:, None] - 1 + torch.arange(batch.completion_ids.shape[1])
    previous = batch.input_ids.gather(1, places.clamp(max=batch.input_ids.shape[1] - 1))
    rows = table[previous].log_softmax(-1)
    logprobs = rows.gather(-1, batch.completion_ids[..., None])[..., 0]
    return TokenScores(logprobs, -(rows.exp() * rows).sum(-1))


table_gradient = partial(objective_steps.table_gradient, scores=embedding_scores)


@every_reduction
@every_objective
def test_cut_of_a_step_leaves_value_and_gradient(
    make: Callable[..., Objective], reduction: Any
) -> None:
    batch = make_batch()
    batch = batch.replace(imitation_mask=some_mask(batch))
    objective = make(reduction=reduction, entropy_coef=0.1)
    value, gradient = table_gradient(objective, batch, [range(8)])
    assert gradient.abs().max() > 1e-4
    order = [3, 0, 6, 2, 7, 1, 5, 4]  # groups are torn apart; the first part of eight is empty
    for parts in (2, 4, 8):
        size = 8 // parts
        cut = [order[i : i + size] for i in range(0, 8, size)]
        other = table_gradient(objective, batch, cut)
        close(other[0], value)
        close(other[1], gradient)


@every_objective
def test_part_without_loss_tokens_gives_zero_with_a_graph(make: Callable[..., Objective]) -> None:
    table = normal(V, V, seed=11).requires_grad_()
    part = make_batch().select([6, 7])
    objective = make(entropy_coef=0.1)
    loss, _ = objective(part, embedding_scores(objective, part, table))
    assert loss.item() == 0.0
    loss.backward()
    assert table.grad is not None
    assert table.grad.eq(0).all()


@every_reduction
@every_objective
def test_left_out_completions_equal_dropped_ones(
    make: Callable[..., Objective], reduction: Any
) -> None:
    batch = make_batch()
    kept = [i for i in range(8) if not CUT[i]]
    dropped = collate(
        [PROMPTS[i] for i in kept],
        [COMPLETIONS[i] for i in kept],
        [GROUPS[i] for i in kept],
        pad_id=PAD,
    )
    width = dropped.completion_ids.shape[1]
    dropped = dropped.replace(
        totals=dropped.count(MAX_TOKENS),
        imitation_mask=dropped.loss_mask,
        **{
            name: getattr(batch, name)[kept][..., :width]
            for name in ("old_logprobs", "teacher_logprobs")
        },
        advantages=batch.advantages[kept],
    )
    objective = make(reduction=reduction)
    value, gradient = table_gradient(objective, batch, [range(8)])
    other = table_gradient(objective, dropped, [range(len(kept))])
    close(other[0], value)
    close(other[1], gradient)


@every_reduction
@every_objective
@pytest.mark.parametrize("fill", [0.0, -3.0])
def test_padding_changes_nothing(
    make: Callable[..., Objective], reduction: Any, fill: float
) -> None:
    batch = make_batch()
    objective = make(reduction=reduction, entropy_coef=0.1)
    tables = [normal(V, V, seed=11).requires_grad_() for _ in range(2)]
    wide = widen(batch, 6, fill)
    losses = []
    for item, table in zip((batch, wide), tables, strict=True):
        loss, _ = objective(item, embedding_scores(objective, item, table))
        loss.backward()
        losses.append(loss)
    close(losses[0], losses[1])
    close(tables[0].grad, tables[1].grad)


@every_reduction
@every_objective
def test_padding_side_changes_nothing(make: Callable[..., Objective], reduction: Any) -> None:
    batch = widen(make_batch(), 2)
    scores = student(batch)
    objective = make(reduction=reduction, entropy_coef=0.1)
    flipped = batch.replace(
        **{
            name: getattr(batch, name).flip(1)
            for name in ("loss_mask", "imitation_mask", "old_logprobs", "teacher_logprobs")
        }
    )
    turned = TokenScores(*(x.detach().flip(1).requires_grad_() for x in scores[:2]))
    a, b = graded(objective, batch, scores), graded(objective, flipped, turned)
    close(a[0], b[0])
    close(a[1], b[1].flip(1))


@every_reduction
@every_objective
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_outside_the_loss_does_not_leak(
    make: Callable[..., Objective], reduction: Any, garbage: float
) -> None:
    batch = make_batch()
    padding = ~batch.loss_mask
    clean = student(batch)
    dirty = TokenScores(
        *(x.detach().masked_fill(padding, garbage).requires_grad_() for x in clean[:2])
    )
    spoilt = batch.replace(
        **{
            name: getattr(batch, name).masked_fill(padding, garbage)
            for name in ("old_logprobs", "teacher_logprobs")
        }
    )
    objective = make(reduction=reduction, entropy_coef=0.1)
    a, b = graded(objective, batch, clean), graded(objective, spoilt, dirty)
    close(b[0], a[0])
    close(b[1], a[1])
    for name, share in b[2].items():
        close(share, a[2][name])


@every_reduction
@every_objective
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_outside_the_loss_does_not_reach_the_parameters(
    make: Callable[..., Objective], reduction: Any, garbage: float
) -> None:
    batch = make_batch()
    spoilt = batch.replace(
        **{
            name: getattr(batch, name).masked_fill(~batch.loss_mask, garbage)
            for name in ("old_logprobs", "teacher_logprobs")
        }
    )
    objective = make(reduction=reduction, entropy_coef=0.1)
    value, gradient = table_gradient(objective, batch, [range(8)])
    other = table_gradient(objective, spoilt, [range(8)])
    close(other[0], value)
    close(other[1], gradient)


@pytest.mark.parametrize("make", ALL[1:3] + ALL[4:6], ids=[*NAMES[1:3], *NAMES[4:6]])
@pytest.mark.parametrize("garbage", [math.nan, -math.inf])
def test_the_teacher_is_ignored_where_nothing_is_imitated(
    make: Callable[..., Objective], garbage: float
) -> None:
    batch = make_batch()
    batch = batch.replace(imitation_mask=some_mask(batch))
    spoilt = batch.replace(
        teacher_logprobs=batch.teacher_logprobs.masked_fill(~batch.imitation_mask, garbage)
    )
    value, gradient = table_gradient(make(), batch, [range(8)])
    other = table_gradient(make(), spoilt, [range(8)])
    close(other[0], value)
    close(other[1], gradient)


# --- What is prepared once per rollout ---


@pytest.mark.parametrize("make", ALL[:4], ids=NAMES[:4])
@pytest.mark.parametrize("scale", [True, False])
def test_prepare_gives_advantages_within_scattered_groups(
    make: Callable[..., Objective], scale: bool
) -> None:
    order = [5, 0, 7, 2, 3, 1, 6, 4]
    batch = make_batch().select(order).replace(advantages=None, imitation_mask=None)
    got = make(scale_by_std=scale).prepare(batch)
    # Groups (1, 0), (.5, 0), (1, 1), (0, 1): plus and minus half the difference, std d / sqrt 2.
    whole = [
        0.0 if d == 0 else d / 2 / (abs(d) / math.sqrt(2) + 1e-6 if scale else 1.0)
        for d in (1.0, -1.0, 0.5, -0.5, 0.0, 0.0, -1.0, 1.0)
    ]
    close(got.advantages, [whole[i] for i in order])
    assert torch.equal(got.imitation_mask, batch.loss_mask)


def test_prepare_takes_an_empty_rollout() -> None:
    prepared = GRPO().prepare(make_batch().select([]))
    assert prepared.advantages.shape == (0,)


def test_prepare_refuses_unequal_groups() -> None:
    batch = make_batch().select([0, 1, 2])
    with pytest.raises(ConfigurationError, match=r"must give groups of one size: got \[2, 1\]\."):
        GRPO().prepare(batch)


def test_prepare_refuses_groups_of_one() -> None:
    with pytest.raises(ConfigurationError, match=r"`group_size` must be at least 2"):
        KDRL().prepare(make_batch().select([0, 2]))


@pytest.mark.parametrize("make", [SFT, OnPolicyDistillation])
def test_prepare_without_groups_needs_no_rewards(make: Callable[..., Objective]) -> None:
    batch = make_batch().select([0, 1, 2]).replace(advantages=None, imitation_mask=None)
    prepared = make().prepare(batch)
    assert prepared.advantages is None
    assert torch.equal(prepared.imitation_mask, batch.loss_mask)


def test_what_an_objective_needs() -> None:
    needs = {c.__name__: (c().needs_teacher, c().needs_groups) for c in (GRPO, KDRL, RLAD, SFT)}
    assert needs == {
        "GRPO": (False, True),
        "KDRL": (True, True),
        "RLAD": (True, True),
        "SFT": (False, False),
    }
    assert OnPolicyDistillation().needs_teacher
    assert not OnPolicyDistillation().needs_groups


def test_defaults_are_the_contracts() -> None:
    kdrl, rlad, grpo = KDRL(), RLAD(), GRPO()
    assert isinstance(kdrl.distill, SampledKL) and isinstance(rlad.ratio, TrustRegionRatio)
    assert (kdrl.coefficient("teacher_kl_coef"), kdrl.distill.ratio_weight) == (2e-3, False)
    assert rlad.coefficient("trrd_alpha") == 0.5
    assert (rlad.ratio.offset_clamp, rlad.ratio.log_ratio_clamp) == (None, 1.0)
    for objective in (kdrl, rlad, grpo):
        assert objective.ratio is not None
        assert (objective.ratio.clip_low, objective.ratio.clip_high) == (0.2, 0.2)
        assert objective.advantage is not None and objective.advantage.scale_by_std
        assert (objective.reduction, objective.entropy_coef) == ("token_mean", 0.0)
    assert OnPolicyDistillation().coefficient("teacher_kl_coef") == 1.0


# --- Refusals ---

NAN = math.nan
REFUSALS: list[tuple[Callable[..., Objective], dict[str, Any], str]] = [
    (SFT, {"entropy_coef": -0.1}, r"`entropy_coef` must be at least 0: got -0\.1\."),
    (GRPO, {"entropy_coef": NAN}, r"`entropy_coef` must be at least 0: got nan\."),
    (GRPO, {"clip_low": -0.1}, r"`clip_low` must be in \[0, 1\]: got -0\.1\."),
    (KDRL, {"clip_low": 1.1}, r"`clip_low` must be in \[0, 1\]: got 1\.1\."),
    (GRPO, {"clip_low": NAN}, r"`clip_low` must be in \[0, 1\]: got nan\."),
    (RLAD, {"clip_high": -0.1}, r"`clip_high` must be at least 0: got -0\.1\."),
    (GRPO, {"clip_high": math.inf}, r"`clip_high` must be at least 0: got inf\."),
    (KDRL, {"teacher_kl_coef": math.inf}, r"`teacher_kl_coef` must be at least 0: got inf\."),
    (GRPO, {"clip_high": NAN}, r"`clip_high` must be at least 0: got nan\."),
    (KDRL, {"teacher_kl_coef": -1.0}, r"`teacher_kl_coef` must be at least 0: got -1\.0\."),
    (KDRL, {"teacher_kl_coef": NAN}, r"`teacher_kl_coef` must be at least 0: got nan\."),
    (OnPolicyDistillation, {"teacher_kl_coef": -1.0}, r"`teacher_kl_coef` must be at least 0: "),
    (RLAD, {"trrd_alpha": 1.1}, r"`trrd_alpha` must be in \[0, 1\]: got 1\.1\. 1 is GRPO, 0 anch"),
    (RLAD, {"trrd_alpha": -0.1}, r"`trrd_alpha` must be in \[0, 1\]: got -0\.1\."),
    (RLAD, {"trrd_alpha": NAN}, r"`trrd_alpha` must be in \[0, 1\]: got nan\."),
    (RLAD, {"offset_clamp": -1.0}, r"`offset_clamp` must be .*: got -1\.0\. Use null for none\."),
]


@pytest.mark.parametrize(("make", "values", "message"), REFUSALS)
def test_bad_values_are_refused(
    make: Callable[..., Objective], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**values)


def test_edge_values_are_taken() -> None:
    GRPO(clip_low=0.0, clip_high=0.0)
    GRPO(clip_low=1.0, clip_high=10.0)
    RLAD(trrd_alpha=0.0, log_ratio_clamp=None)
    RLAD(trrd_alpha=1.0)
    KDRL(teacher_kl_coef=0.0, entropy_coef=0.0)


def test_unknown_reduction_is_refused() -> None:
    reduction: Any = "mean"
    message = r"`reduction` must be one of token_mean, .*, group_token_mean: got mean\."
    with pytest.raises(ConfigurationError, match=message):
        SFT(reduction=reduction)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (GRPO, "old_logprobs"),
        (GRPO, "advantages"),
        (GRPO, "totals"),
        (KDRL, "teacher_logprobs"),
        (KDRL, "imitation_mask"),
        (RLAD, "old_logprobs"),
        (RLAD, "teacher_logprobs"),
        (RLAD, "advantages"),
        (OnPolicyDistillation, "teacher_logprobs"),
        (OnPolicyDistillation, "imitation_mask"),
        (lambda: OnPolicyDistillation(kd_ratio_weight=True), "old_logprobs"),
        (SFT, "totals"),
    ],
)
def test_missing_scores_are_named(make: Callable[..., Objective], field: str) -> None:
    batch = make_batch()
    scores = student(batch)
    message = rf"`{field}` must be present in the rollout batch: got None\. Score the rollout"
    with pytest.raises(ConfigurationError, match=message):
        make()(batch.replace(**{field: None}), scores)


def test_rlad_statistics_name_a_missing_teacher() -> None:
    batch = make_batch().replace(teacher_logprobs=None)
    with pytest.raises(ConfigurationError, match=r"`teacher_logprobs` must be present"):
        RLAD().log_ratio(batch, f64(torch.zeros(batch.loss_mask.shape)))
