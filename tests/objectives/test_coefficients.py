"""Coefficients: schedules can set them, and bad values are refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.objective_steps import graded, make, ready, step, student
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import (
    CISPO,
    GKD,
    GRPO,
    GSPO,
    KDRL,
    RLAD,
    RLSD,
    SFT,
    SRPO,
    Advantage,
    Gates,
    MaskedImportance,
    Objective,
    OnPolicyDistillation,
    PolicyObjective,
    SampledKL,
    SequenceRatio,
    ShapedProbability,
    SumAdvantage,
    SurrogateTerm,
    TokenRatio,
    TruncatedImportance,
    TrustRegionRatio,
    VocabularyKL,
    WrongGroups,
)

# --- Coefficients ---

COEFFICIENTS: list[tuple[Objective, dict[str, float]]] = [
    (GRPO(ref_kl_coef=0.2), {"rl_coef": 1.0, "ref_kl_coef": 0.2, "entropy_coef": 0.0}),
    (KDRL(0.3), {"teacher_kl_coef": 0.3}),
    (KDRL(0.3, form="advantage"), {"teacher_kl_coef": 0.3, "reward_coef": 1.0}),
    (KDRL(0.3, form="reward_shaping"), {"teacher_kl_coef": 0.3}),
    (RLAD(0.4), {"trrd_alpha": 0.4, "rl_coef": 1.0}),
    (GKD(teacher_kl_coef=0.6), {"teacher_kl_coef": 0.6}),
    (SFT(entropy_coef=0.1), {"entropy_coef": 0.1}),
    (
        GRPO(rl_coef=0.5, distill=SurrogateTerm(TrustRegionRatio(0.4), 2.0), entropy_coef=0.1),
        {"rl_coef": 0.5, "distill_coef": 2.0, "trrd_alpha": 0.4, "entropy_coef": 0.1},
    ),
    (KDRL(distill=VocabularyKL(0.3, top_k=3)), {"teacher_kl_coef": 0.3}),
]


@pytest.mark.parametrize(("objective", "values"), COEFFICIENTS)
def test_coefficients_are_read_and_set_where_they_act(
    objective: Objective, values: dict[str, float]
) -> None:
    batch = step()
    scores = student(batch)
    for name, value in values.items():
        changed = copy.deepcopy(objective)
        assert changed.coefficient(name) == value
        before = graded(changed, ready(changed, batch), scores)
        changed.set_coefficient(name, 0.77)
        assert changed.coefficient(name) == 0.77
        after = graded(changed, ready(changed, batch), scores)
        assert not torch.equal(before[0], after[0])


def test_unknown_coefficients_are_refused_by_name() -> None:
    message = (
        r"`coefficient` must be one of KDRL's \((?=.*rl_coef)(?=.*ref_kl_coef)"
        r"(?=.*teacher_kl_coef)(?!.*trrd_alpha\)).*: got trrd_alpha\."
    )
    with pytest.raises(ConfigurationError, match=message):
        KDRL().coefficient("trrd_alpha")
    with pytest.raises(ConfigurationError, match=r"one of SFT's \(entropy_coef\): got reduction"):
        SFT().set_coefficient("reduction", 1.0)


def test_a_coefficient_of_two_parts_is_refused() -> None:
    objective = PolicyObjective(TokenRatio(), SumAdvantage(0.1), SampledKL(0.2))
    message = (
        r"`coefficient` must belong to one part: got teacher_kl_coef, "
        r"which SumAdvantage and SampledKL have\."
    )
    with pytest.raises(ConfigurationError, match=message):
        objective.set_coefficient("teacher_kl_coef", 0.3)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(("objective", "values"), COEFFICIENTS)
def test_coefficients_are_set_in_their_range_only(
    objective: Objective, values: dict[str, float], value: float
) -> None:
    for name in values:
        with pytest.raises(ConfigurationError, match=rf"`{name}` must be .*: got {value}"):
            objective.set_coefficient(name, value)
    with pytest.raises(ConfigurationError, match=r"`trrd_alpha` must be in \[0, 1\]: got 1\.1"):
        RLAD().set_coefficient("trrd_alpha", 1.1)


# --- Refusals ---

REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: GRPO(dual_clip=1.0), r"`dual_clip` must be above 1: got 1\.0\. 3 is usual, null"),
    (lambda: RLAD(dual_clip=math.inf), r"`dual_clip` must be above 1: got inf\."),
    (lambda: GRPO(dual_clip=math.nan), r"`dual_clip` must be above 1: got nan\."),
    (lambda: GSPO(clip_low=1.5), r"`clip_low` must be in \[0, 1\]: got 1\.5\."),
    (lambda: CISPO(-0.1), r"`clip_high` must be at least 0: got -0\.1\."),
    (lambda: ShapedProbability(0.0), r"`gamma` must be above 0: got 0\.0\. The paper uses 0\.1\."),
    (lambda: ShapedProbability(math.inf), r"`gamma` must be above 0: got inf\."),
    (lambda: RLSD(mix=1.1), r"`mix` must be in \[0, 1\]: got 1\.1\. 0 is GRPO\."),
    (lambda: RLSD(width=-0.1), r"`width` must be in \[0, 1\]: got -0\.1\."),
    (lambda: SumAdvantage(-1.0), r"`teacher_kl_coef` must be at least 0: got -1\.0\."),
    (lambda: SumAdvantage(reward_coef=-1.0), r"`reward_coef` must be at least 0: got -1\.0\."),
    (lambda: KDRL(-1.0, form="reward_shaping"), r"`teacher_kl_coef` must be at least 0: got -1"),
    (lambda: GRPO(rl_coef=-1.0), r"`rl_coef` must be at least 0: got -1\.0\."),
    (lambda: GRPO(ref_kl_coef=-1.0), r"`ref_kl_coef` must be at least 0: got -1\.0\."),
    (
        lambda: SurrogateTerm(TokenRatio(), -1.0),
        r"`distill_coef` must be at least 0: got -1\.0\.",
    ),
    (
        lambda: SRPO(distill=SurrogateTerm(TrustRegionRatio())),
        r"`distill` SurrogateTerm must be added to .* from rewards alone: got VerdictAdvantage\.",
    ),
    (
        lambda: PolicyObjective(None, None, SurrogateTerm(TrustRegionRatio())),
        r"`distill` SurrogateTerm must be added to .*: got None\. Use Advantage, e\.g\. GRPO\.",
    ),
    (
        lambda: GRPO(distill=SurrogateTerm(TrustRegionRatio()), teacher_tokens=ShapedProbability()),
        r"`teacher_tokens` must be None with `distill` SurrogateTerm, .*: got ShapedProbability\.",
    ),
    (
        lambda: KDRL(0.3, distill=VocabularyKL(2e-3)),
        r"`distill` must be given without `teacher_kl.*`, .*: got VocabularyKL and some of them\.",
    ),
    (
        lambda: KDRL(form="advantage", distill=SampledKL()),
        r"`distill` must be given without .*`form`.*: got SampledKL and some of them\.",
    ),
    (
        lambda: SampledKL(estimator="k1"),
        r"`estimator` must be one of k2, k3, policy_gradient: got k1\. The expected .* is zero\.",
    ),
    (lambda: SampledKL(estimator="k4"), r"`estimator` must be .*: got k4\. Choose one of them\.$"),
    (lambda: VocabularyKL(jsd_beta=1.5), r"`jsd_beta` must be in \[0, 1\]: got 1\.5\. 1 is rev"),
    (lambda: GKD(jsd_beta=-0.5), r"`jsd_beta` must be in \[0, 1\]: got -0\.5\."),
    (lambda: GKD(top_k=0), r"`top_k` must be at least 1: got 0\. Use null for the full vocab"),
    (
        lambda: KDRL(kd_ratio_weight=True, kl_estimator="top_k"),
        r"`kd_ratio_weight` must be false for `kl_estimator` top_k, which is exact .*: got true\.",
    ),
    (
        lambda: KDRL(form="advantage", kl_estimator="k3"),
        r"`form` must be joint for `kl_estimator`, .* belong to its loss: got advantage\.",
    ),
    (
        lambda: KDRL(form="reward_shaping", kd_per_imitated_token=True),
        r"`form` must be joint for .*: got reward_shaping\.",
    ),
    (
        lambda: KDRL(form="sum"),  # type: ignore[arg-type]
        r"`form` must be joint, advantage or reward_shaping: got sum\.",
    ),
    (
        lambda: PolicyObjective(TokenRatio(), None),
        r"`ratio` and `advantage` must be given together, or .*: got TokenRatio, None, None\. Add",
    ),
    (lambda: PolicyObjective(None, Advantage(), SampledKL()), r"got None, Advantage, SampledKL\."),
    (lambda: PolicyObjective(None, None), r"or `distill` alone: got None, None, None\."),
    (
        lambda: GRPO(selection=[WrongGroups()]),
        r"`selection` must be used with a part.*: got WrongGroups and TokenRatio, Advantage\. Drop",
    ),
    (
        lambda: OnPolicyDistillation(teacher_tokens=ShapedProbability()),
        r"`teacher_tokens` must be given with a policy loss: got ShapedProbability and SampledKL",
    ),
    (
        lambda: GKD(selection=[Gates(None, 0.0)]),
        r"`advantage_threshold` must be used with .* from rewards: got None, VocabularyKL\.",
    ),
    (lambda: TruncatedImportance(0.9), r"`cap` must be at least 1: got 0\.9\. 2 is usual\."),
    (lambda: MaskedImportance(0.0), r"`low` must be above 0 and at most 1: got 0\.0\."),
    (lambda: MaskedImportance(1.1), r"`low` must be above 0 and at most 1: got 1\.1\."),
    (lambda: MaskedImportance(high=0.9), r"`high` must be at least 1: got 0\.9\."),
    (lambda: Gates(-1.0), r"`alignment_threshold` must be at least 0: got -1\.0\. Use null for"),
    (lambda: Gates(None, math.nan), r"`advantage_threshold` must be a number: got nan\."),
    (lambda: Gates(None, None, -1.0), r"`exploration_entropy` must be at least 0: got -1\.0\."),
    (
        lambda: Gates(1.0, alignment_per="row"),  # type: ignore[arg-type]
        r"`alignment_per` must be token or completion: got row\.",
    ),
    (lambda: TrustRegionRatio(2.0), r"`trrd_alpha` must be in \[0, 1\]: got 2\.0\."),
    (lambda: SequenceRatio(-0.1), r"`clip_low` must be in \[0, 1\]: got -0\.1\."),
]


@pytest.mark.parametrize(("build", "message"), REFUSALS)
def test_bad_values_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("gspo", "old_logprobs"),
        ("cispo", "old_logprobs"),
        ("behavior", "rollout_logprobs"),
        ("truncated", "rollout_logprobs"),
        ("reference", "ref_logprobs"),
        ("opd-gap", "teacher_logprobs"),
        ("kdrl-shaping", "teacher_logprobs"),
        ("kdrl-topk", "teacher_topk_logprobs"),
    ],
)
def test_missing_scores_are_named(name: str, field: str) -> None:
    batch = step()
    scores = student(batch)
    objective = make(name)
    with pytest.raises(ConfigurationError, match=rf"`{field}` must be present in the rollout ba"):
        objective(ready(objective, batch.replace(**{field: None})), scores)


@pytest.mark.parametrize(("name", "field"), [("gkd", "divergence"), ("gkd-topk", "topk_logprobs")])
def test_missing_scores_of_the_student_are_named(name: str, field: str) -> None:
    objective = make(name)
    batch = ready(objective, step())
    with pytest.raises(ConfigurationError, match=rf"`{field}` must be present"):
        objective(batch, student(batch)._replace(**{field: None}))
