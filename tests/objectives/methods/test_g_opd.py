"""G-OPD and ExOPD (arXiv 2602.12125): two anchors, and the optimum between or beyond them."""

from __future__ import annotations

import pytest
import torch

from helpers.objective_steps import graded, ready, same, step, student
from helpers.one_position import expected_gradient
from helpers.reference import close, normal, reverse_kl_gradient
from kdrl_lightning import GOPD, ClippedDistillation, ConfigurationError
from kdrl_lightning.objectives import ExtrapolatedGap

TEACHER, REFERENCE = (normal(5, seed=s).log_softmax(-1) for s in (1, 2))


def test_at_one_it_is_on_policy_distillation() -> None:
    same(GOPD(1.0), ClippedDistillation(), step())


def test_at_zero_the_reference_is_the_teacher() -> None:
    batch = step()
    swapped = batch.replace(teacher_logprobs=batch.ref_logprobs)
    scores, (ours, plain) = student(batch), (GOPD(0.0), ClippedDistillation())
    found = graded(ours, ready(ours, batch), scores)
    expected = graded(plain, ready(plain, swapped), scores)
    close(found[0], expected[0])
    close(found[1]["logprobs"], expected[1]["logprobs"])


@pytest.mark.parametrize("extrapolation", [0.0, 1.5, 7.0])
def test_a_teacher_that_is_the_reference_cannot_be_extrapolated(extrapolation: float) -> None:
    batch = step()
    same(
        GOPD(extrapolation),
        ClippedDistillation(),
        batch.replace(ref_logprobs=batch.teacher_logprobs),
    )


@pytest.mark.parametrize("extrapolation", [0.0, 0.5, 1.25, 2.0])
def test_its_gradient_is_that_of_reverse_kl_to_the_extrapolated_teacher(
    extrapolation: float,
) -> None:
    """Enumerated over the vocabulary; so the extrapolated teacher is the optimum."""
    target = (extrapolation * TEACHER + (1 - extrapolation) * REFERENCE).log_softmax(-1)
    objective = GOPD(extrapolation)
    logits = normal(5, seed=3)
    reference = {"ref_logprobs": REFERENCE}
    found = expected_gradient(objective, logits, TEACHER, **reference)
    expected = reverse_kl_gradient(logits.log_softmax(-1).tolist(), target.tolist())
    close(found, expected)
    close(expected_gradient(objective, target, TEACHER, **reference), torch.zeros(5))


def test_the_reference_scores_and_its_kl_is_not_in_the_loss() -> None:
    objective, batch = GOPD(), step()
    assert objective.needs_reference and not ClippedDistillation().needs_reference
    terms = {t.name: t.coef for t in objective.terms(ready(objective, batch), student(batch))}
    assert terms == {"policy": 1.0, "ref_kl": 0.0}


def test_an_extrapolation_below_zero_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`extrapolation` must be at least 0: got -1.0"):
        ExtrapolatedGap(-1.0)
