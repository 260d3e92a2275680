"""EOPD: on-policy distillation, plus a forward KL to the teacher on tokens where it is unsure."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.errors import require_between, require_count
from kdrl_lightning.losses import TokenScores, generalized_jsd, with_tail
from kdrl_lightning.objectives.advantages import GapAdvantage
from kdrl_lightning.objectives.base import known, teacher_logprobs
from kdrl_lightning.objectives.divergences import DistillTerm
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio
from kdrl_lightning.rollout_batch import RolloutBatch


class TeacherTopK(DistillTerm):
    """A divergence from the teacher's distribution over its K most likely tokens, renormalised.

    The student is not renormalised: its probability outside these tokens goes into one bucket, in
    which the teacher has 0. At ``jsd_beta`` 0 the divergence is ``sum_K T log(T / S)``, as in EOPD
    (arXiv 2603.07079); at 0.5 it is the exact Jensen-Shannon divergence of the renormalised teacher
    and the whole student, as in HDPO (2603.23871).

    Args:
        teacher_kl_coef: weight of the term, at least 0.
        jsd_beta: 0 is KL(teacher || student), in [0, 1). At 1, KL(student || teacher), the bucket
            would make it infinite.
        top_k: K, the number of the teacher's most likely tokens.
        entropy_above: act only on tokens at which the teacher's entropy over the full vocabulary is
            above this, in nats; None: on all tokens.
        per_imitated_token: divide by the step's imitated tokens, whatever the ``reduction``.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    name = "teacher_top_k"

    def __init__(
        self,
        teacher_kl_coef: float = 1.0,
        jsd_beta: float = 0.0,
        top_k: int = 16,
        entropy_above: float | None = None,
        per_imitated_token: bool = False,
    ) -> None:
        super().__init__(teacher_kl_coef, per_imitated_token)
        require_between("jsd_beta", jsd_beta, 0.0, 1.0 - 1e-6, "0 is forward KL.")
        require_count("top_k", top_k, 1, float("inf"), "16 is usual.")
        if entropy_above is not None:
            require_between("entropy_above", entropy_above, 0.0, float("inf"), "0.8 is published.")
        self.jsd_beta = jsd_beta
        self.teacher_top_k = top_k
        self.entropy_above = entropy_above
        self.needs_teacher_entropy = entropy_above is not None

    def where(self, batch: RolloutBatch) -> Tensor:
        """Return the imitated tokens at which the teacher is unsure enough."""
        mask = super().where(batch)
        if self.entropy_above is None:
            return mask
        return mask & (known(batch.teacher_entropy, "teacher_entropy") > self.entropy_above)

    def per_token(self, batch: RolloutBatch, scores: TokenScores, mask: Tensor) -> Tensor:
        """Return the divergence at each position."""
        student = with_tail(known(scores.topk_logprobs, "topk_logprobs"), scores.tail_logprobs)
        teacher = known(batch.teacher_topk_logprobs, "teacher_topk_logprobs")
        # On tokens that are not imitated the teacher's values may be NaN.
        teacher = torch.where(mask[..., None], teacher, 0.0)
        outside = torch.full_like(teacher[..., :1], -torch.inf)
        # The divergence normalises the teacher's logits, which renormalises its K tokens.
        return generalized_jsd(student, torch.cat([teacher, outside], -1), self.jsd_beta)


class FixedGap(GapAdvantage):
    """Gives ``log pi_T - log pi_old``, which stays the same in all updates of a rollout: EOPD."""

    def __call__(self, batch: RolloutBatch, gap: Tensor) -> Tensor:
        """Return the gap at rollout time; 0 on tokens that are not imitated."""
        mask = known(batch.imitation_mask, "imitation_mask") & batch.student_mask
        old = known(batch.old_logprobs, "old_logprobs")
        return torch.where(mask, teacher_logprobs(batch, old) - old, 0.0)

    def changed(self, batch: RolloutBatch, advantages: Tensor) -> Tensor:
        """Return the tokens with an advantage, which comes from the teacher alone."""
        return advantages != 0


class EOPD(PolicyObjective):
    """EOPD: distillation by policy gradient, plus a forward KL where the teacher is unsure.

    arXiv 2603.07079: ``-min(rho a, clip(rho, 1 - clip_low, 1 + clip_high) a)`` per token, with
    ``a = log pi_T - log pi_old``, and on tokens at which the teacher's entropy is above
    ``entropy_above`` also ``teacher_kl_coef sum_K T log(T / S)`` over the teacher's K most likely
    tokens, with T renormalised over them and S not. Rewards are measured but do not enter the loss.

    Args:
        entropy_above: see ``TeacherTopK``. Published: 0.8; null: on all tokens.
        top_k: see ``TeacherTopK``. Published: 16.
        teacher_kl_coef: weight of the forward KL, at least 0. Published: 1.
        clip_low: see ``TokenRatio``.
        clip_high: see ``TokenRatio``.
        policy: further settings of ``PolicyObjective``. The paper uses ``sequence_mean`` for
            ``reduction``.
    """

    def __init__(
        self,
        entropy_above: float | None = 0.8,
        top_k: int = 16,
        teacher_kl_coef: float = 1.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=TokenRatio(clip_low, clip_high),
            advantage=FixedGap(),
            distill=TeacherTopK(teacher_kl_coef, 0.0, top_k, entropy_above),
            **policy,
        )
