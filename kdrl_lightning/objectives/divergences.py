"""Distillation terms: losses against the teacher, added to the policy loss."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError, require_between, require_count
from kdrl_lightning.losses import (
    TokenScores,
    generalized_jsd,
    k2,
    k3,
    policy_gradient_kl,
    with_tail,
)
from kdrl_lightning.losses.head.chunk_math import Divergence
from kdrl_lightning.losses.logprobs import LOGPROB_FLOOR
from kdrl_lightning.losses.teacher_chunks import chunk_share, chunk_totals
from kdrl_lightning.objectives.base import Part, check_coefficient, known, teacher_logprobs
from kdrl_lightning.objectives.ratios import Ratio
from kdrl_lightning.rollout_batch import RolloutBatch

SAMPLED = {"k2": k2, "k3": k3, "policy_gradient": policy_gradient_kl}


class DistillTerm(Part):
    """A per-token loss against the teacher, added with weight ``teacher_kl_coef``.

    Args:
        teacher_kl_coef: weight of the term, at least 0.
        per_imitated_token: divide by the step's imitated tokens, whatever the ``reduction``.

    Attributes:
        name: logged as ``loss/<name>``.
        needs_advantages: the term reads the advantages of the policy loss.
        ratio: the ratio that the term clips; None without one.
        sampled: the term is an estimate from sampled tokens, not from distributions.
        top_k: number of the student's most likely tokens that the teacher must score; 0: none.
        teacher_top_k: number of the teacher's most likely tokens that both models must score; 0:
            none.
        divergence: full-vocabulary divergence to compute in each update; None without one.
    """

    needs_teacher = True
    name: str = "teacher_kl"
    needs_advantages: bool = False
    ratio: Ratio | None = None
    sampled: bool = False
    top_k: int = 0
    teacher_top_k: int = 0
    divergence: Divergence | None = None

    def __init__(self, teacher_kl_coef: float = 2e-3, per_imitated_token: bool = False) -> None:
        self.teacher_kl_coef = check_coefficient("teacher_kl_coef", teacher_kl_coef)
        self.per_imitated_token = per_imitated_token

    @property
    def coef(self) -> float:
        """Weight of the term in the loss."""
        return self.teacher_kl_coef

    @property
    def corrected(self) -> bool:
        """Whether ``engine_correction`` weights the term's tokens."""
        return self.sampled

    def weights(self, rollout: RolloutBatch) -> Tensor | None:
        """Return ``[B, T]`` weights of the imitated tokens, once per rollout; None: all are 1.

        The step's totals hold their sum, so that ``per_token`` can normalise them.
        """
        return None

    @abstractmethod
    def per_token(self, batch: RolloutBatch, scores: TokenScores, mask: Tensor) -> Tensor:
        """Return the ``[B, T]`` loss; only the tokens of ``mask [B, T]`` will count."""

    def where(self, batch: RolloutBatch) -> Tensor:
        """Return ``[B, T]`` bool: the tokens on which the term acts."""
        return known(batch.imitation_mask, "imitation_mask") & batch.loss_mask

    def imitated(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return ``[B, T]`` bool: the teacher enters the term's gradient on the token."""
        return self.where(batch)


class SampledKL(DistillTerm):
    """A KL estimate on the sampled tokens of the student's completions (arXiv 2506.02208, Eq. 8).

    Args:
        teacher_kl_coef: weight of the term, at least 0.
        estimator: ``k2`` and ``policy_gradient`` have reverse KL's gradient, ``k3`` **forward**
            KL's. ``k1`` is refused: its expected gradient is zero.
        ratio_weight: weight the estimate by the detached ratio, which keeps the gradient unbiased
            with several updates per rollout. At the first update the ratio is 1.
        per_imitated_token: divide by the step's imitated tokens, whatever the ``reduction``.

    Raises:
        ConfigurationError: the estimator is unknown or k1, or the weight is out of range.
    """

    sampled = True

    def __init__(
        self,
        teacher_kl_coef: float = 2e-3,
        estimator: str = "k2",
        ratio_weight: bool = False,
        per_imitated_token: bool = False,
    ) -> None:
        super().__init__(teacher_kl_coef, per_imitated_token)
        if estimator not in SAMPLED:
            why = "The expected gradient of k1 as a loss is zero. " if estimator == "k1" else ""
            raise ConfigurationError(
                f"`estimator` must be one of {', '.join(SAMPLED)}: got {estimator}. {why}Choose "
                "one of them."
            )
        self.estimator = estimator
        self.ratio_weight = ratio_weight

    def where(self, batch: RolloutBatch) -> Tensor:
        """Return the imitated tokens that the student sampled: on others the estimate is wrong."""
        return super().where(batch) & batch.student_mask

    def per_token(self, batch: RolloutBatch, scores: TokenScores, mask: Tensor) -> Tensor:
        """Return the estimate at each sampled token."""
        teacher, places = teacher_logprobs(batch, scores.logprobs), batch.chunk_places
        # Ignore the teacher on tokens that are not imitated, even if its value there is -inf.
        teacher = torch.where(mask, teacher, scores.logprobs.detach())
        per_token = chunk_share(SAMPLED[self.estimator](scores.logprobs, teacher), places)
        if not self.ratio_weight:
            return per_token
        log_ratio = (scores.logprobs - known(batch.old_logprobs, "old_logprobs")).detach()
        return per_token * chunk_totals(torch.where(mask, log_ratio, 0.0), places).exp()


class VocabularyKL(DistillTerm):
    """The generalised Jensen-Shannon divergence of whole distributions: GKD (arXiv 2306.13649).

    It compares distributions, so it is also valid on the teacher's completions. Over the full
    vocabulary it is exact at each position, and the teacher runs in every update. With ``top_k``
    the teacher scores the student's most likely tokens once per rollout, and all other tokens share
    one bucket.

    Args:
        teacher_kl_coef: weight of the term, at least 0.
        jsd_beta: 0 is KL(teacher || student), 1 is KL(student || teacher), in [0, 1].
        top_k: number of the student's most likely tokens at rollout time; None: all tokens.
        per_imitated_token: divide by the step's imitated tokens, whatever the ``reduction``.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    def __init__(
        self,
        teacher_kl_coef: float = 1.0,
        jsd_beta: float = 1.0,
        top_k: int | None = None,
        per_imitated_token: bool = False,
    ) -> None:
        super().__init__(teacher_kl_coef, per_imitated_token)
        require_between("jsd_beta", jsd_beta, 0.0, 1.0, "1 is reverse KL.")
        if top_k is None:
            self.divergence = partial(floored_jsd, jsd_beta=jsd_beta)
        else:
            require_count("top_k", top_k, 1, float("inf"), "Use null for the full vocabulary.")
            self.top_k = top_k
        self.jsd_beta = jsd_beta

    def per_token(self, batch: RolloutBatch, scores: TokenScores, mask: Tensor) -> Tensor:
        """Return the divergence at each position."""
        if self.divergence is not None:
            return known(scores.divergence, "divergence")
        student = with_tail(known(scores.topk_logprobs, "topk_logprobs"), scores.tail_logprobs)
        teacher = with_tail(
            known(batch.teacher_topk_logprobs, "teacher_topk_logprobs"),
            batch.teacher_tail_logprobs,
        )
        teacher = torch.where(mask[..., None], teacher, student.detach())
        # A bucket that is empty for both adds 0; with the floor the divergence would be infinite.
        empty = student.detach() == -torch.inf
        if batch.teacher_tail_logprobs is not None:
            empty = empty & (teacher == -torch.inf)
        empty[..., :-1] = False
        teacher = teacher.clamp(min=LOGPROB_FLOOR).masked_fill(empty, -torch.inf)
        return generalized_jsd(student, teacher, self.jsd_beta)


class SurrogateTerm(DistillTerm):
    """A second clipped surrogate with a separate weight, e.g. RLAD's surrogate added to GRPO's.

    ``-distill_coef min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` per token, with the ratio r
    of ``ratio`` and the advantages A of the policy loss. RLAD's ratio is Eq. 3 of arXiv 2602.22495.

    Args:
        ratio: the ratio rule, e.g. ``TrustRegionRatio``.
        distill_coef: weight of the term, at least 0.

    Raises:
        ConfigurationError: the weight is out of range.
    """

    name = "distill_policy"
    needs_advantages = True
    sampled = True
    per_imitated_token = False
    ratio: Ratio

    # The weight has another name, so that a schedule of `teacher_kl_coef` does not change it.
    def __init__(self, ratio: Ratio, distill_coef: float = 1.0) -> None:
        self.ratio = ratio
        self.needs_teacher = ratio.needs_teacher
        self.distill_coef = check_coefficient("distill_coef", distill_coef)

    @property
    def coef(self) -> float:
        """Weight of the term in the loss."""
        return self.distill_coef

    def where(self, batch: RolloutBatch) -> Tensor:
        """Return every loss token: on those not imitated, the ratio ignores the teacher."""
        return batch.loss_mask

    def per_token(self, batch: RolloutBatch, scores: TokenScores, mask: Tensor) -> Tensor:
        """Return the surrogate of each token."""
        return self.ratio.loss(batch, scores.logprobs, self._advantages(batch))

    def imitated(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the tokens whose ratio is anchored at the teacher and has a gradient."""
        if not self.ratio.anchored:
            return torch.zeros_like(batch.loss_mask)
        advantages = self._advantages(batch)
        used = super().where(batch) & (advantages != 0)
        return used & ~self.ratio.dead(batch, logprobs, advantages)

    def _advantages(self, batch: RolloutBatch) -> Tensor:
        advantages = known(batch.advantages, "advantages")
        return advantages if advantages.dim() == 2 else advantages[:, None]


def floored_jsd(student_logits: Tensor, teacher_logits: Tensor, jsd_beta: float) -> Tensor:
    """Return ``generalized_jsd`` with the teacher's log-probabilities raised to ``LOGPROB_FLOOR``.

    Without the floor, reverse KL is infinite if the teacher excludes a token.

    Args:
        student_logits: ``[..., V]`` unnormalised log-probabilities, with gradient.
        teacher_logits: ``[..., V]`` the teacher's.
        jsd_beta: weight of the teacher in the mixture, in [0, 1].

    Returns:
        ``[...]`` nats.
    """
    teacher = teacher_logits.log_softmax(-1).clamp(min=LOGPROB_FLOOR)
    return generalized_jsd(student_logits, teacher, jsd_beta)
