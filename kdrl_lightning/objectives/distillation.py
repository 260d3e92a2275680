"""Distillation without rewards: on-policy reverse KL, and GKD's generalised divergence."""

from __future__ import annotations

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.objectives.advantages import GapAdvantage
from kdrl_lightning.objectives.divergences import VocabularyKL
from kdrl_lightning.objectives.kdrl import named_kl
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio


class OnPolicyDistillation(PolicyObjective):
    """On-policy reverse KL without rewards: KDRL's baseline KD-RKL (arXiv 2506.02208, section 2.2).

    ``teacher_kl_coef (log pi_T - log pi)^2 / 2`` per token of the student's completions: the k2
    estimate, with the gradient of KL(pi || pi_T). Rewards are measured but do not enter the loss.

    Args:
        teacher_kl_coef: weight of the KL, at least 0.
        kd_ratio_weight: see ``KDRL``.
        kl_estimator: see ``KDRL``.
        kd_top_k: K of the estimator ``top_k``.
        kd_per_imitated_token: divide by the step's imitated tokens, whatever ``reduction`` is.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        teacher_kl_coef: float = 1.0,
        kd_ratio_weight: bool = False,
        kl_estimator: str = "k2",
        kd_top_k: int = 64,
        kd_per_imitated_token: bool = False,
        **policy: PolicySetting,
    ) -> None:
        kl = named_kl(
            teacher_kl_coef, kl_estimator, kd_ratio_weight, kd_top_k, kd_per_imitated_token
        )
        super().__init__(ratio=None, advantage=None, distill=kl, **policy)


class ClippedDistillation(PolicyObjective):
    """On-policy distillation as a clipped policy gradient, as later papers write it (2609.04108).

    ``-min(rho d, clip(rho, 1 - clip_low, 1 + clip_high) d)`` per token, with ``rho = pi / pi_old``
    and the advantage ``d = log pi_T - log pi``, without gradient. At rho = 1 it has the gradient of
    ``OnPolicyDistillation``. In later updates the clip stops a token that has moved far enough,
    while k2 keeps pulling towards the teacher. Rewards are measured but do not enter the loss.

    Args:
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``.
        dual_clip: see ``TokenRatio``.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high, dual_clip), advantage=GapAdvantage(), **policy
        )


class GKD(PolicyObjective):
    """Generalised knowledge distillation, which compares whole distributions (arXiv 2306.13649).

    ``teacher_kl_coef (b KL(T || M) + (1 - b) KL(S || M))`` at each token, with the teacher's
    distribution T, the student's S, ``M = b T + (1 - b) S`` and ``b = jsd_beta``. Rewards are
    measured but do not enter the loss.

    It trains on completions of student and teacher: the paper's student-data fraction is
    ``group_size / (group_size + teacher_completions)``.

    Args:
        jsd_beta: see ``VocabularyKL``.
        teacher_kl_coef: weight of the divergence, at least 0.
        top_k: see ``VocabularyKL``.
        kd_per_imitated_token: divide by the step's imitated tokens, whatever ``reduction`` is.
        policy: further settings of ``PolicyObjective``.
    """

    takes_teacher_completions = True

    def __init__(
        self,
        jsd_beta: float = 0.5,
        teacher_kl_coef: float = 1.0,
        top_k: int | None = None,
        kd_per_imitated_token: bool = False,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=None,
            advantage=None,
            distill=VocabularyKL(teacher_kl_coef, jsd_beta, top_k, kd_per_imitated_token),
            **policy,
        )
