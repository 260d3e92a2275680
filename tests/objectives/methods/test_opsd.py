"""OPSD (arXiv 2601.18734) and SDFT (2601.19897): forward KL over the full vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.objective_steps import bigram, normal, ready, step, table_gradient
from helpers.reference import close, log_softmax
from kdrl_lightning import GKD, OPSD, SDFT, ConfigurationError
from kdrl_lightning.losses import clipped_forward_kl, forward_kl
from kdrl_lightning.objectives import ClippedForwardKL, ExceptFirstTokens, Objective

STUDENT, TEACHER = normal(4, 6, seed=1, scale=2.0), normal(4, 6, seed=2, scale=2.0)


def whole_step(objective: Objective) -> tuple[float, torch.Tensor]:
    return table_gradient(objective, ready(objective, step()), [range(16)])


def test_the_cap_acts_on_each_vocabulary_entry() -> None:
    leaf = STUDENT.clone().requires_grad_()
    value = clipped_forward_kl(leaf, TEACHER, 0.05)
    (found,) = torch.autograd.grad(value.sum(), leaf)
    for row, (student, teacher) in enumerate(zip(STUDENT.tolist(), TEACHER.tolist(), strict=True)):
        s, t = log_softmax(student), log_softmax(teacher)
        summands = [math.exp(b) * (b - a) for a, b in zip(s, t, strict=True)]
        close(value[row], sum(min(x, 0.05) for x in summands))
        # d/dz_j of -T_v log S_v is -T_v (1[v = j] - S_j); capped entries give none.
        alive = [math.exp(b) if x < 0.05 else 0.0 for b, x in zip(t, summands, strict=True)]
        close(found[row], [sum(alive) * math.exp(a) - b for a, b in zip(s, alive, strict=True)])
        assert any(x > 0.05 for x in summands) and any(x < 0.0 for x in summands)


def test_the_capped_sum_can_be_negative() -> None:
    """T = (.9, .1), S = (.5, .5): the summands are .53, capped at .05, and -.16."""
    student, teacher = torch.tensor([0.0, 0.0]), torch.tensor([0.9, 0.1]).log()
    assert clipped_forward_kl(student, teacher, 0.05).item() == pytest.approx(
        0.05 + 0.1 * math.log(0.2)
    )
    assert forward_kl(student, teacher) > 0.0


def test_without_a_cap_it_is_the_forward_kl() -> None:
    assert torch.equal(clipped_forward_kl(STUDENT, TEACHER, None), forward_kl(STUDENT, TEACHER))
    found, expected = whole_step(OPSD(None)), whole_step(GKD(0.0))
    close(found[0], expected[0])
    close(found[1], expected[1])
    assert abs(whole_step(OPSD(0.05))[0] - expected[0]) > 0.01


def test_an_impossible_token_is_capped_without_a_gradient() -> None:
    leaf = torch.tensor([0.0, -torch.inf]).requires_grad_()
    value = clipped_forward_kl(leaf, torch.zeros(2), 0.05)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.isfinite() and gradient.isfinite().all()


def test_it_has_a_name_of_its_own() -> None:
    batch = ready(OPSD(), step())
    scores = bigram(OPSD(), batch, normal(6, 6, seed=11))
    assert [t.name for t in OPSD().terms(batch, scores)] == ["clipped_forward_kl"]


def test_a_negative_cap_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`pointwise_clip` must be at least 0: got -1.0"):
        ClippedForwardKL(pointwise_clip=-1.0)


def test_skipped_tokens_leave_numerator_and_denominator() -> None:
    """The loss is that of completions whose first two tokens are outside the loss."""
    skipped, plain = SDFT(2), SDFT(0)
    batch = step()
    later = torch.arange(batch.loss_mask.shape[1]) >= 2
    masked = batch.replace(loss_mask=batch.loss_mask & later)
    found = whole_step(skipped)
    expected = table_gradient(plain, ready(plain, masked), [range(16)])
    close(found[0], expected[0])
    close(found[1], expected[1])
    assert ready(skipped, batch).totals.num_imitated_tokens == masked.loss_mask.sum()  # type: ignore[union-attr]


def test_without_skipping_and_capping_sdft_is_opsd() -> None:
    found, expected = whole_step(SDFT(0)), whole_step(OPSD(None))
    close(found[0], expected[0])
    close(found[1], expected[1])


def test_a_negative_number_of_tokens_cannot_be_skipped() -> None:
    with pytest.raises(ConfigurationError, match=r"`count` must be at least 0: got -1"):
        ExceptFirstTokens(-1)
