"""KDRL: GRPO plus reverse KL to a teacher on the student's own rollouts."""

from __future__ import annotations

from typing import Any, Literal

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives.advantages import Advantage, ShapedAdvantage, SumAdvantage
from kdrl_lightning.objectives.divergences import DistillTerm, SampledKL, VocabularyKL
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio

ESTIMATORS = ("k2", "k3", "policy_gradient", "full_vocabulary", "top_k")


class KDRL(PolicyObjective):
    """Knowledge distillation and RL together (arXiv 2506.02208, Eq. 8).

    ``GRPO + teacher_kl_coef * k2(student, teacher)``. At ratio 1 its gradient is that of a policy
    gradient with per-token advantage ``A + teacher_kl_coef * (log pi_T - log pi)``, the form
    ``advantage``. KDRL-mask: ``selection: [WrongCompletions]`` or ``[WrongGroups]``.

    Args:
        teacher_kl_coef: weight of the KL, at least 0. Published: 2e-3 constant, or 5e-3 annealed to
            1e-3 (see ``KLCoefficientAnnealing``).
        kd_ratio_weight: weight the sampled KL by the detached ratio, which keeps it unbiased with
            several updates per rollout [our choice].
        kl_estimator: ``k2`` (the paper's) and ``policy_gradient``: reverse KL's gradient, on
            sampled tokens; ``k3``: **forward** KL's; ``full_vocabulary``: reverse KL, exact, the
            teacher runs in every update; ``top_k``: reverse KL over the student's most likely
            tokens and a tail bucket. ``k1`` is refused: as a loss its expected gradient is zero.
        form: ``joint``: a loss beside GRPO's (the paper's choice); ``advantage``: A + beta d inside
            the clipped surrogate; ``reward_shaping``: the mean gap in the reward.
        kd_top_k: K of ``top_k``.
        kd_per_imitated_token: divide the KL by the imitated tokens, not by all loss tokens.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
        dual_clip: upper bound on the ratio where A < 0, above 1; None for none.
        scale_by_std: divide advantages by the group's standard deviation.
        policy: further settings of ``PolicyObjective``. The paper takes ``group_token_mean`` for
            ``reduction``.
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
        **policy: Any,
    ) -> None:
        advantage, distill = Advantage(scale_by_std), None
        if form == "joint":
            distill = teacher_kl(
                teacher_kl_coef, kl_estimator, kd_ratio_weight, kd_top_k, kd_per_imitated_token
            )
        elif kl_estimator != "k2" or kd_ratio_weight or kd_per_imitated_token:
            raise ConfigurationError(
                f"`form` must be joint for `kl_estimator`, `kd_ratio_weight` and "
                f"`kd_per_imitated_token`, which belong to its loss: got {form}."
            )
        elif form == "advantage":
            advantage = SumAdvantage(teacher_kl_coef, scale_by_std=scale_by_std)
        elif form == "reward_shaping":
            advantage = ShapedAdvantage(teacher_kl_coef, scale_by_std)
        else:
            raise ConfigurationError(
                f"`form` must be joint, advantage or reward_shaping: got {form}."
            )
        super().__init__(TokenRatio(clip_low, clip_high, dual_clip), advantage, distill, **policy)


def teacher_kl(
    teacher_kl_coef: float,
    kl_estimator: str,
    ratio_weight: bool,
    top_k: int,
    per_imitated_token: bool,
) -> DistillTerm:
    """Return the distillation term of an estimator's name.

    Raises:
        ConfigurationError: there is no such estimator, k1 among them.
    """
    if kl_estimator not in ESTIMATORS:
        why = " The expected gradient of k1 as a loss is zero." if kl_estimator == "k1" else ""
        raise ConfigurationError(
            f"`kl_estimator` must be one of {', '.join(ESTIMATORS)}: got {kl_estimator}.{why}"
        )
    if kl_estimator not in ("full_vocabulary", "top_k"):
        return SampledKL(teacher_kl_coef, kl_estimator, ratio_weight, per_imitated_token)
    if ratio_weight:
        raise ConfigurationError(
            f"`kd_ratio_weight` must be false for `kl_estimator` {kl_estimator}, which is exact at "
            "each position: got true."
        )
    k = top_k if kl_estimator == "top_k" else None
    return VocabularyKL(teacher_kl_coef, 1.0, k, per_imitated_token)
