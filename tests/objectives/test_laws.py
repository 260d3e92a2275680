"""Laws of every preset: cuts of a step, padding, garbage in masked tokens, masked rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.objective_steps import (
    CUT,
    MAX_TOKENS,
    ORDER,
    PRESETS,
    REDUCTIONS,
    TABLES,
    TAUGHT,
    TEACHER_TABLES,
    K,
    V,
    bigram,
    graded,
    keep,
    make,
    ready,
    some_mask,
    step,
    student,
    table_gradient,
    widen,
)
from helpers.reference import close, normal
from kdrl_lightning.losses import TokenScores
from kdrl_lightning.objectives import GRPO
from kdrl_lightning.objectives.base import blank
from kdrl_lightning.rollout_batch import RolloutBatch

every_preset = pytest.mark.parametrize("name", PRESETS)
every_taught = pytest.mark.parametrize("name", TAUGHT)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_garbage = pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])


def same(a: tuple[Any, Any], b: tuple[Any, Any]) -> None:
    close(a[0], b[0])
    if isinstance(a[1], Tensor):
        close(a[1], b[1])
    else:
        for name in a[1]:
            close(a[1][name], b[1][name])


@every_reduction
@every_preset
def test_cut_of_a_step_leaves_value_and_gradient(name: str, reduction: Any) -> None:
    batch = step()
    objective = keep(make(name, reduction=reduction, entropy_coef=0.1), some_mask(batch))
    batch = ready(objective, batch)
    whole = table_gradient(objective, batch, [range(16)])
    assert whole[1].abs().max() > 1e-4
    for parts in (2, 4, 8):
        size = 16 // parts
        same(
            table_gradient(
                objective, batch, [ORDER[i : i + size] for i in range(0, len(ORDER), size)]
            ),
            whole,
        )


@every_preset
def test_part_without_loss_tokens_gives_zero_with_a_graph(name: str) -> None:
    objective = make(name, entropy_coef=0.1)
    part = ready(objective, step()).select(ORDER[:2])
    table = normal(V, V, seed=11).requires_grad_()
    loss, shares = objective(part, bigram(objective, part, table))
    assert loss.item() == 0.0
    assert all(share.item() == 0.0 for share in shares.values())
    loss.backward()
    assert table.grad is not None
    assert table.grad.eq(0).all()


@every_reduction
@every_preset
def test_amount_of_padding_changes_nothing(name: str, reduction: Any) -> None:
    objective = make(name, reduction=reduction, entropy_coef=0.1)
    narrow, wide = (ready(objective, b) for b in (step(), widen(step(), 5, -3.0)))
    tables = [normal(V, V, seed=11).requires_grad_() for _ in range(2)]
    pairs = []
    for batch, table in zip((narrow, wide), tables, strict=True):
        loss, _ = objective(batch, bigram(objective, batch, table))
        pairs.append((loss, torch.autograd.grad(loss, table)[0]))
    same(*pairs)


@every_reduction
@every_preset
def test_side_of_padding_changes_nothing(name: str, reduction: Any) -> None:
    objective = make(name, reduction=reduction, entropy_coef=0.1)
    batch = ready(objective, step())
    scores = student(batch)
    tables = {
        n: x.flip(1)
        for n, x in vars(batch).items()
        if isinstance(x, Tensor) and x.dim() >= 2 and n != "input_ids"
    }
    flipped = scores.map(lambda x: x.detach().flip(1).requires_grad_())
    value, gradients = graded(objective, batch.replace(**tables), flipped)
    same(graded(objective, batch, scores), (value, {n: g.flip(1) for n, g in gradients.items()}))


def spoil(batch: RolloutBatch, where: Tensor, garbage: float, *names: str) -> RolloutBatch:
    changes = {}
    for name in names:
        value = getattr(batch, name)
        changes[name] = value.masked_fill(where[..., None] if value.dim() == 3 else where, garbage)
    return batch.replace(**changes)


@every_garbage
@every_reduction
@every_preset
def test_garbage_outside_the_loss_does_not_leak(name: str, reduction: Any, garbage: float) -> None:
    objective = make(name, reduction=reduction, entropy_coef=0.1)
    clean = step()
    out = ~clean.loss_mask
    spoilt = ready(objective, spoil(clean, out, garbage, *TABLES, *TEACHER_TABLES))
    clean = ready(objective, clean)
    if name == "sft-correct":
        out = ~clean.loss_mask
    scores = student(clean)
    dirty = TokenScores(
        *(
            None
            if x is None
            else x.detach()
            .masked_fill(out[..., None] if x.dim() == 3 else out, garbage)
            .requires_grad_()
            for x in scores
        )
    )
    same(graded(objective, spoilt, dirty), graded(objective, clean, scores))
    same(
        table_gradient(objective, spoilt, [range(16)]),
        table_gradient(objective, clean, [range(16)]),
    )


@every_garbage
@every_taught
def test_the_teacher_is_ignored_where_nothing_is_imitated(name: str, garbage: float) -> None:
    batch = step()
    mask = some_mask(batch)
    objective = keep(make(name), mask)
    spoilt = spoil(batch, ~mask, garbage, *TEACHER_TABLES)
    a, b = ready(objective, batch), ready(objective, spoilt)
    scores = student(a)
    same(graded(objective, b, scores), graded(objective, a, scores))


@every_garbage
@every_taught
def test_sampled_terms_leave_the_teachers_completions_alone(name: str, garbage: float) -> None:
    batch = step()
    theirs = (batch.source == 1)[:, None].expand_as(batch.loss_mask)
    objective = make(name)
    spoilt = spoil(batch, theirs, garbage, "teacher_logprobs")
    scores = student(batch)
    same(
        graded(objective, ready(objective, spoilt), scores),
        graded(objective, ready(objective, batch), scores),
    )


@every_reduction
@every_preset
def test_left_out_completions_equal_dropped_ones(name: str, reduction: Any) -> None:
    objective = make(name, reduction=reduction)
    batch = ready(objective, step())
    kept = [i for i in range(16) if not CUT[i]]
    dropped = batch.select(kept)
    dropped = dropped.replace(totals=dropped.count(MAX_TOKENS))
    same(
        table_gradient(objective, dropped, [range(len(kept))]),
        table_gradient(objective, batch, [range(16)]),
    )


@every_taught
def test_teacher_scores_get_no_gradient(name: str) -> None:
    objective = make(name)
    batch = step()
    leaves = {
        n: getattr(batch, n).clone().requires_grad_() for n in (*TEACHER_TABLES, "old_logprobs")
    }
    loss, _ = objective(ready(objective, batch.replace(**leaves)), student(batch))
    assert loss.requires_grad
    for leaf, gradient in zip(
        leaves.values(),
        torch.autograd.grad(loss, leaves.values(), allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert leaf.requires_grad and gradient.eq(0).all()


@every_preset
def test_shares_add_up_to_the_loss(name: str) -> None:
    objective = make(name, entropy_coef=0.1)
    batch = ready(objective, step())
    loss, shares = objective(batch, student(batch))
    coefs = {t.name: t.coef for t in objective.terms(batch, student(batch))} | {"entropy": 0.1}
    assert shares.keys() == coefs.keys()
    close(loss, sum(coefs[n] * share for n, share in shares.items()))


def test_the_step_has_every_kind_of_row() -> None:
    batch = step()
    used = batch.loss_mask.any(1)
    for row in (batch.correct & used, ~batch.correct & used, batch.source.bool() & used, ~used):
        assert row.any()
    assert not batch.loss_mask[ORDER[:2]].any()
    assert batch.topk_ids.shape[-1] == K


@every_preset
def test_an_empty_rollout_is_prepared(name: str) -> None:
    prepared = ready(make(name), step().select([]))
    assert len(prepared) == 0
    assert prepared.totals is not None and prepared.totals.num_loss_tokens == 0


@every_garbage
@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_garbage_in_the_reference_does_not_leak(garbage: float, coef: float) -> None:
    objective = GRPO(ref_kl_coef=coef)
    clean = step()
    spoilt = ready(objective, spoil(clean, ~clean.loss_mask, garbage, "ref_logprobs"))
    clean = ready(objective, clean)
    same(graded(objective, spoilt, student(clean)), graded(objective, clean, student(clean)))


def test_every_field_is_zero_outside_the_loss() -> None:
    batch, names = step(), ("rollout", "old", "teacher", "ref", "teacher_topk", "teacher_tail")
    fields = [f"{name}_logprobs" for name in names] + ["importance_weights", "imitation_weights"]
    bad = torch.full(batch.completion_ids.shape, math.inf)
    filled = batch.replace(**dict.fromkeys(fields, bad))
    clean, scores = blank(filled, TokenScores(bad, bad))
    for value in (*(getattr(clean, name) for name in fields), scores.logprobs, scores.entropy):
        assert torch.equal(value.isinf(), batch.loss_mask)
        assert not value[~batch.loss_mask].any()
