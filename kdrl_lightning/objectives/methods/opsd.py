"""OPSD: forward KL over the full vocabulary, capped per vocabulary entry."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.errors import require_between
from kdrl_lightning.losses import TokenScores, clipped_forward_kl
from kdrl_lightning.objectives.base import known
from kdrl_lightning.objectives.divergences import DistillTerm
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.rollout_batch import RolloutBatch


class ClippedForwardKL(DistillTerm):
    """KL(teacher || student) with each vocabulary entry's summand capped (arXiv 2601.18734 v3).

    The sum can be negative, so it is not a divergence; it is logged as ``loss/clipped_forward_kl``.
    The teacher runs in every update.

    Args:
        teacher_kl_coef: weight of the term, at least 0.
        pointwise_clip: largest summand of a vocabulary entry, in nats, at least 0; None: no cap.
            The paper gives no value; later code uses 0.05.
        per_imitated_token: divide by the step's imitated tokens, whatever the ``reduction``.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    name = "clipped_forward_kl"

    def __init__(
        self,
        teacher_kl_coef: float = 1.0,
        pointwise_clip: float | None = 0.05,
        per_imitated_token: bool = False,
    ) -> None:
        super().__init__(teacher_kl_coef, per_imitated_token)
        if pointwise_clip is not None:
            require_between("pointwise_clip", pointwise_clip, 0.0, float("inf"), "Null: no cap.")
        self.pointwise_clip = pointwise_clip
        self.divergence = partial(clipped_forward_kl, clip=pointwise_clip)

    def per_token(self, batch: RolloutBatch, scores: TokenScores, mask: Tensor) -> Tensor:
        """Return the capped sum at each position."""
        return known(scores.divergence, "divergence")


class OPSD(PolicyObjective):
    """On-Policy Self-Distillation: capped forward KL over the full vocabulary (arXiv 2601.18734).

    ``teacher_kl_coef sum_v min(T_v log(T_v / S_v), pointwise_clip)`` at each token of the student's
    completions. As published the teacher is the initial student with the reference solution in its
    prompt. Rewards are measured but do not enter the loss.

    Args:
        pointwise_clip: see ``ClippedForwardKL``.
        teacher_kl_coef: weight of the term, at least 0.
        kd_per_imitated_token: divide by the step's imitated tokens, whatever ``reduction`` is.
        policy: further settings of ``PolicyObjective``. The paper uses ``sequence_mean`` for
            ``reduction``.
    """

    def __init__(
        self,
        pointwise_clip: float | None = 0.05,
        teacher_kl_coef: float = 1.0,
        kd_per_imitated_token: bool = False,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=None,
            advantage=None,
            distill=ClippedForwardKL(teacher_kl_coef, pointwise_clip, kd_per_imitated_token),
            **policy,
        )
