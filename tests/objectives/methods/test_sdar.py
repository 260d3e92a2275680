"""SDAR (arXiv 2605.15155): what its gate does."""

from __future__ import annotations

import pytest
import torch

from helpers.objective_steps import graded, ready, same, step, student
from helpers.one_position import expected_gradient
from helpers.reference import close, normal, reverse_kl_gradient
from kdrl_lightning import GRPO, SDAR, ConfigurationError
from kdrl_lightning.losses import gate
from kdrl_lightning.objectives import GatedGap, PolicyObjective

LOGITS, TEACHER = normal(5, seed=1), normal(5, seed=2).log_softmax(-1)
RKL = torch.tensor(
    reverse_kl_gradient(LOGITS.log_softmax(-1).tolist(), TEACHER.tolist()), dtype=torch.float64
)


def test_without_weight_it_is_grpo() -> None:
    same(SDAR(0.0), GRPO(), step())


def test_without_a_gap_the_gate_is_one_half() -> None:
    batch = step(mixed=False)
    scores = student(batch, near=0.0)
    term = GatedGap(1.0)
    gradient = torch.autograd.grad(
        term.per_token(
            batch.replace(teacher_logprobs=scores.logprobs.detach()), scores, batch.loss_mask
        ).sum(),
        scores.logprobs,
    )[0]
    assert gradient.eq(-0.5).all()


def test_at_ratio_one_it_adds_the_gate_to_the_advantage() -> None:
    """The clip does not act, so GRPO with the advantage A + c g has the same gradient."""
    batch = step(mixed=False)
    scores = student(batch, near=0.0)
    both, plain = SDAR(0.3, 2.0), GRPO()
    known = ready(plain, batch)
    gap = batch.teacher_logprobs - scores.logprobs.detach()
    shifted = known.replace(advantages=known.advantages[:, None] + 0.3 * gate(gap, 2.0))
    found = graded(both, ready(both, batch), scores)[1]["logprobs"]
    close(found, graded(plain, shifted, scores)[1]["logprobs"])


def test_a_flat_gate_teaches_nothing_on_average() -> None:
    alone = PolicyObjective(None, None, distill=GatedGap(1.0, 0.0))
    close(expected_gradient(alone, LOGITS, TEACHER), torch.zeros(5))


def test_a_soft_gate_is_a_reverse_kl() -> None:
    """Its expected gradient is sharpness / 4 of reverse KL's, up to third order."""
    alone = PolicyObjective(None, None, distill=GatedGap(1.0, 1e-3))
    close(expected_gradient(alone, LOGITS, TEACHER) * 4e3, RKL, 1e-5)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_sharpness_that_cannot_be_is_refused(value: float) -> None:
    with pytest.raises(ConfigurationError, match=r"`sharpness` must be at least 0: got"):
        GatedGap(sharpness=value)
