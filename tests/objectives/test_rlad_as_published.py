"""All of RLAD's Eq. 4, and its KDRL baseline, against slow references from the paper's text."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, pstdev

import pytest
import torch

import kdrl_lightning
from helpers.objective_steps import graded, keep, ready, same, some_mask, step, student
from helpers.reference import close, published_trrd
from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import GRPO, KDRL, RLAD, PolicyObjective, TrustRegionRatio
from kdrl_lightning.rollout_batch import RolloutBatch

CONFIGS = Path(kdrl_lightning.__file__).parent / "configs"
PUBLISHED = {
    "log_ratio_clamp": 1.0,
    "clip_high": 0.28,
    "reduction": "sequence_mean",
}


def group_advantages(batch: RolloutBatch) -> list[float]:
    """(r - mean) / sigma with sigma over 1 / G; 0 in a group of equal rewards."""
    rewards, groups = batch.rewards.tolist(), batch.group_ids.tolist()
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        of_group = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        sigma = pstdev(of_group)
        out.append((reward - fmean(of_group)) / sigma if sigma else 0.0)
    return out


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("wide", [0.4, 2.0])
def test_the_whole_objective_is_eq_4(beta: float, wide: float) -> None:
    """The sequence mean of clipped TRRD, the population's sigma, the reference KL (as k3)."""
    batch = step(mixed=False, wide=wide)
    size = 4
    # The library divides by the sample's standard deviation (1 / (G - 1)).
    sigma = math.sqrt(size / (size - 1))
    objective = RLAD(rl_coef=sigma, ref_kl_coef=beta, **PUBLISHED)
    scores = student(batch)
    got, gradients = graded(objective, ready(objective, batch), scores)

    lp, loss = scores.logprobs.detach(), 0.0
    expected = torch.zeros_like(lp)
    advantages = group_advantages(batch)
    used = [i for i in range(len(batch)) if bool(batch.loss_mask[i].any())]
    for i in used:
        tokens = batch.loss_mask[i].nonzero().flatten().tolist()
        for t in tokens:
            now, old, teacher, ref = (
                float(x[i, t])
                for x in (lp, batch.old_logprobs, batch.teacher_logprobs, batch.ref_logprobs)
            )
            weight, a = 1.0 / (len(used) * len(tokens)), advantages[i]
            ratio, slope = published_trrd(now, old, teacher, 0.5, 1.0)
            fenced = (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)
            loss -= weight * a * (min(max(ratio, 0.8), 1.28) if fenced else ratio)
            expected[i, t] -= 0.0 if fenced else weight * a * ratio * slope
            gap = ref - now
            loss += beta * weight * (math.exp(gap) - gap - 1.0)
            expected[i, t] += beta * weight * (1.0 - math.exp(gap))
    close(got, loss, 1e-5)  # the library adds 1e-6 to sigma
    close(gradients["logprobs"], expected, 1e-5)


def test_a_token_that_is_not_imitated_has_rho_with_the_papers_clamp() -> None:
    """Also far off policy, where a clamp on log(pi / pi_old) would act."""
    batch = step(mixed=False)
    mask = some_mask(batch)
    nothing = torch.zeros_like(mask)
    same(keep(RLAD(**PUBLISHED), nothing), GRPO(0.2, 0.28, reduction="sequence_mean"), batch, 2.0)
    objective = keep(RLAD(**PUBLISHED), mask)
    scores = student(batch, near=2.0)
    ready_batch = ready(objective, batch)
    log_ratio = objective.log_ratio(ready_batch, scores.logprobs)
    outside = batch.loss_mask & ~mask
    close(log_ratio[outside], (scores.logprobs - batch.old_logprobs)[outside])
    assert isinstance(objective, PolicyObjective)
    cut = objective.ratio.clamped(ready_batch, scores.logprobs)  # type: ignore[union-attr]
    far = (scores.logprobs - batch.teacher_logprobs).abs() > 1.0
    assert torch.equal(cut & batch.loss_mask, far & mask & batch.loss_mask)
    assert 0 < int(cut.sum()) < int(batch.loss_mask.sum())


def test_rlad_takes_one_clamp() -> None:
    with pytest.raises(ConfigurationError, match="`log_ratio_clamp` must not be set with an `of"):
        RLAD(offset_clamp=1.0, log_ratio_clamp=1.0)
    with pytest.raises(ConfigurationError, match="`log_ratio_clamp` must be at least 0: got -1"):
        RLAD(log_ratio_clamp=-1.0)


@pytest.mark.parametrize(
    ("given", "clamps"),
    [
        ({}, (None, 1.0)),
        ({"offset_clamp": 0.7}, (0.7, None)),
        ({"log_ratio_clamp": 0.7}, (None, 0.7)),
        ({"log_ratio_clamp": None}, (None, None)),
        ({"offset_clamp": 0.7, "log_ratio_clamp": None}, (0.7, None)),
    ],
)
def test_the_papers_clamp_is_the_default_and_an_offset_clamp_replaces_it(
    given: dict[str, float | None], clamps: tuple[float | None, float | None]
) -> None:
    for ratio in (RLAD(**given).ratio, TrustRegionRatio(**given)):  # type: ignore[arg-type]
        assert isinstance(ratio, TrustRegionRatio)
        assert (ratio.offset_clamp, ratio.log_ratio_clamp) == clamps


def test_the_configuration_is_the_paper_s() -> None:
    file = CONFIGS / "rlad_published.yaml"
    config = load_with_base(file.read_text(), str(file))
    given = config["model"]["objective"]["init_args"]
    assert given.pop("rl_coef") == pytest.approx(
        math.sqrt(8 / 7), rel=1e-6
    )  # groups of 8, as in the base file
    assert config["data"]["rollout"]["group_size"] == 8
    assert given == {"trrd_alpha": 0.5, "clip_low": 0.2, **PUBLISHED}


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_rlads_kdrl_baseline_is_grpo_with_the_teacher_as_its_reference(beta: float) -> None:
    """RLAD, section 3: the teacher replaces pi_ref in GRPO's KL, which GRPO estimates by k3."""
    batch = step(mixed=False)
    shape = {"clip_high": 0.28, "reduction": "sequence_mean"}
    baseline = KDRL(beta, kl_estimator="k3", **shape)
    grpo = GRPO(ref_kl_coef=beta, **shape)
    scores = student(batch)
    theirs = batch.replace(ref_logprobs=batch.teacher_logprobs)
    got = graded(baseline, ready(baseline, batch), scores)
    expected = graded(grpo, ready(grpo, theirs), scores)
    close(got[0], expected[0])
    close(got[1]["logprobs"], expected[1]["logprobs"])
