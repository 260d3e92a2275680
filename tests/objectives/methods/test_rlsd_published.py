"""RLSD as published (arXiv 2604.03128 v2, Algorithm 1): laws of its weight, and its schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from helpers.objective_steps import graded, ready, same, step, student
from helpers.reference import close
from kdrl_lightning import GRPO, RLSD
from kdrl_lightning.callbacks import CoefficientSchedule
from kdrl_lightning.callbacks.schedules import Linear
from kdrl_lightning.losses.advantages import reweighted

CONFIG = Path(__file__).parents[3] / "configs/rlsd_published.yaml"
PUBLISHED: dict[str, Any] = yaml.safe_load(CONFIG.read_text())


def test_without_a_share_of_the_teacher_it_is_grpo_bit_for_bit() -> None:
    batch, scores = step(), student(step())
    found, expected = (graded(o, ready(o, batch), scores) for o in (RLSD(0.0), GRPO()))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1]["logprobs"], expected[1]["logprobs"])


def test_a_teacher_without_an_opinion_leaves_grpo() -> None:
    batch = step()
    scores = student(batch)
    agreed = batch.replace(teacher_logprobs=scores.logprobs.detach())
    same(RLSD(0.5, 0.2), GRPO(), agreed.replace(old_logprobs=batch.old_logprobs))


def test_rows_without_a_context_get_grpo() -> None:
    same(RLSD(0.5), GRPO(), step().replace(has_context=torch.zeros(16, dtype=torch.bool)))


def test_the_factor_is_bounded_and_keeps_the_sign() -> None:
    advantages = torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64).expand(3, 41)
    gap = torch.linspace(-30, 30, 41, dtype=torch.float64).expand(3, 41)
    found = reweighted(advantages, gap, 0.5, 0.2)
    assert found[2].eq(0).all()
    factor = found[:2] / advantages[:2]
    assert factor.min() == 0.9 and factor.max() == 1.1


def test_unclipped_weights_multiply_to_the_ratio_of_the_completion() -> None:
    """The product over t is (P_T(o) / P_S(o))^sign(A)."""
    gap = torch.tensor([[0.02, -0.05, 0.1]], dtype=torch.float64)
    for sign in (1.0, -1.0):
        weights = reweighted(torch.full_like(gap, sign), gap, 1.0, 0.2) / sign
        close(weights.prod(), (sign * gap.sum()).exp())


def test_the_schedule_of_the_configuration_is_the_paper_s() -> None:
    """lambda = .5 max(0, 1 - step / 50), and the other published values."""
    (given,) = (
        c["init_args"]
        for c in PUBLISHED["trainer"]["callbacks"]
        if c["class_path"] == "CoefficientSchedule"
    )
    assert given["coefficient"] == "mix"
    schedule = CoefficientSchedule("mix", Linear(**given["schedule"]["init_args"]))
    assert [schedule.coef_at(s) for s in (0, 25, 50, 90)] == [0.5, 0.25, 0.0, 0.0]
    assert schedule.metric == "kd/mix"
    settings = PUBLISHED["model"]["objective"]["init_args"]
    assert (settings["mix"], settings["width"], settings["reduction"]) == (
        *(0.5, 0.2),
        "sequence_mean",
    )
    objective = RLSD(**settings)
    objective.set_coefficient("mix", 0.25)
    assert objective.coefficient("mix") == 0.25
