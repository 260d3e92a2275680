"""KDRL: GRPO plus a reverse KL to the teacher, on the student's completions."""

from __future__ import annotations

from typing import Literal

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives.advantages import Advantage, ShapedAdvantage, SumAdvantage
from kdrl_lightning.objectives.divergences import SAMPLED, DistillTerm, SampledKL, VocabularyKL
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio

ESTIMATORS = (*SAMPLED, "full_vocabulary", "top_k")


class KDRL(PolicyObjective):
    """KDRL: knowledge distillation and RL in one loss (arXiv 2506.02208, Eq. 8).

    ``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta (log pi_T - log pi)^2 / 2`` per
    token, with ``rho = pi / pi_old``, A the group-relative advantage, ``beta = teacher_kl_coef``.

    The first term is GRPO's surrogate, the second the k2 estimate of KL(pi || pi_T). At rho = 1 the
    gradient is that of a policy gradient with advantage ``A + beta (log pi_T - log pi)`` per token;
    ``form: advantage`` computes it that way. For KDRL-mask set ``selection: [WrongCompletions]`` or
    ``[WrongGroups]``.

    ``kl_estimator`` and the ``kd_*`` arguments name the usual distillation terms. Pass any other
    term as ``distill``, e.g. ``VocabularyKL(2e-3, top_k=64)``.

    Args:
        teacher_kl_coef: beta, at least 0. Published: 2e-3 constant, or 5e-3 annealed to 1e-3 (see
            ``KLCoefficientAnnealing``).
        kd_ratio_weight: weight the sampled KL by the detached ratio, which keeps it unbiased with
            several updates per rollout [our choice].
        kl_estimator: ``k2`` (the paper's) and ``policy_gradient`` have reverse KL's gradient on
            sampled tokens, ``k3`` **forward** KL's. ``full_vocabulary`` is the exact reverse KL,
            for which the teacher runs in every update; ``top_k`` is the reverse KL over the
            student's most likely tokens and a tail bucket. ``k1`` is refused: its expected gradient
            is zero.
        form: ``joint`` adds two losses (the paper's choice), ``advantage`` puts the advantage above
            into the clipped surrogate, ``reward_shaping`` adds beta times the mean of
            ``log pi_T - log pi_old`` to a completion's reward.
        kd_top_k: K of the estimator ``top_k``.
        kd_per_imitated_token: divide the KL by the step's imitated tokens, whatever ``reduction``
            is.
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``.
        dual_clip: see ``TokenRatio``.
        scale_by_std: see ``Advantage``.
        distill: the distillation term with its weight; it replaces the arguments above that
            describe one.
        policy: further settings of ``PolicyObjective``. The paper uses ``group_token_mean`` for
            ``reduction``.

    Raises:
        ConfigurationError: the arguments name no term, contradict each other, or are out of range.
    """

    def __init__(
        self,
        teacher_kl_coef: float = 2e-3,
        kd_ratio_weight: bool = False,
        kl_estimator: str = "k2",
        form: Literal["joint", "advantage", "reward_shaping"] = "joint",
        kd_top_k: int = 64,
        kd_per_imitated_token: bool = False,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        scale_by_std: bool = True,
        distill: DistillTerm | None = None,
        **policy: PolicySetting,
    ) -> None:
        names = (teacher_kl_coef, kd_ratio_weight, kl_estimator, form, kd_top_k)
        advantage, kl = _by_name(*names, kd_per_imitated_token, scale_by_std)
        if distill is not None and (*names, kd_per_imitated_token) != _defaults():
            raise ConfigurationError(
                "`distill` must be given without `teacher_kl_coef`, `form`, `kl_estimator` and "
                f"`kd_*`, which also describe a term: got {type(distill).__name__} and some of "
                "them. Set the weight in `distill`, and leave the others out."
            )
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high, dual_clip),
            advantage=advantage,
            distill=distill or kl,
            **policy,
        )


def _by_name(
    teacher_kl_coef: float,
    ratio_weight: bool,
    kl_estimator: str,
    form: str,
    top_k: int,
    per_imitated_token: bool,
    scale_by_std: bool,
) -> tuple[Advantage, DistillTerm | None]:
    """Return the advantage rule and the distillation term that the arguments name."""
    if form == "joint":
        kl = named_kl(teacher_kl_coef, kl_estimator, ratio_weight, top_k, per_imitated_token)
        return Advantage(scale_by_std), kl
    if kl_estimator != "k2" or ratio_weight or per_imitated_token:
        raise ConfigurationError(
            "`form` must be joint for `kl_estimator`, `kd_ratio_weight` and "
            f"`kd_per_imitated_token`, which belong to its loss: got {form}. Leave them out, or "
            "set `form: joint`."
        )
    if form == "advantage":
        return SumAdvantage(teacher_kl_coef, scale_by_std=scale_by_std), None
    if form == "reward_shaping":
        return ShapedAdvantage(teacher_kl_coef, scale_by_std), None
    raise ConfigurationError(
        f"`form` must be joint, advantage or reward_shaping: got {form}. Choose one of them."
    )


def _defaults() -> tuple[object, ...]:
    """Return the defaults of the arguments that name a term, in their order."""
    return (KDRL.__init__.__defaults__ or ())[:6]


def named_kl(
    teacher_kl_coef: float,
    kl_estimator: str,
    ratio_weight: bool = False,
    top_k: int = 64,
    per_imitated_token: bool = False,
) -> DistillTerm:
    """Return the KL term that ``kl_estimator`` names: forward KL for ``k3``, else reverse KL.

    Args:
        teacher_kl_coef: weight of the term, at least 0.
        kl_estimator: ``k2``, ``k3``, ``policy_gradient``, ``full_vocabulary`` or ``top_k``.
        ratio_weight: weight a sampled estimate by the detached ratio.
        top_k: K of ``top_k``.
        per_imitated_token: divide by the step's imitated tokens, whatever the ``reduction``.

    Raises:
        ConfigurationError: the estimator is unknown or k1 (its expected gradient is zero), or
            ``ratio_weight`` is set for an exact one.
    """
    if kl_estimator not in ESTIMATORS:
        why = "The expected gradient of k1 as a loss is zero. " if kl_estimator == "k1" else ""
        raise ConfigurationError(
            f"`kl_estimator` must be one of {', '.join(ESTIMATORS)}: got {kl_estimator}. "
            f"{why}Choose one of them."
        )
    if kl_estimator not in ("full_vocabulary", "top_k"):
        return SampledKL(teacher_kl_coef, kl_estimator, ratio_weight, per_imitated_token)
    if ratio_weight:
        raise ConfigurationError(
            f"`kd_ratio_weight` must be false for `kl_estimator` {kl_estimator}, which is exact at "
            "each position: got true. Leave it out."
        )
    k = top_k if kl_estimator == "top_k" else None
    return VocabularyKL(teacher_kl_coef, 1.0, k, per_imitated_token)
