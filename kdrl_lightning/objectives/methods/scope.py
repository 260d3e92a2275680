"""SCOPE: likelihood on correct completions, distillation on wrong ones, weighted per group."""

from __future__ import annotations

import sys
from typing import Literal

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses import shares
from kdrl_lightning.losses.teacher_chunks import chunk_share
from kdrl_lightning.objectives.advantages import Advantage, by_group
from kdrl_lightning.objectives.base import known
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.ratios import TokenRatio
from kdrl_lightning.rollout_batch import RolloutBatch

Scale = Literal["sum", "mean"]


class RarityWeights(Advantage):
    """Gives w to correct completions and ``w d`` to wrong ones: SCOPE (arXiv 2604.10688).

    Over the correct completions of a group, w is the softmax of ``-l_S / tau``, so rare successes
    count more; over the wrong ones it is the softmax of ``l_T / tau``, so completions that the
    teacher finds improbable count less. l_S and l_T are a completion's mean log-probability per
    token under the old student and the teacher. Completions outside the loss, and wrong ones
    outside the selection or without a context, get weight 0 and enter neither softmax.

    Args:
        weight_temperature: tau, above 0. Published: 1. None: all weights of a softmax are equal.
        scale: whether a softmax's weights have a ``sum`` of 1, as in the paper, or a ``mean`` of 1,
            as in its code.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    needs_teacher = True
    reads_old_scores = True

    def __init__(self, weight_temperature: float | None = 1.0, scale: Scale = "sum") -> None:
        super().__init__(scale_by_std=False)
        if weight_temperature is not None and not 0.0 < weight_temperature < float("inf"):
            raise ConfigurationError(
                f"`weight_temperature` must be above 0: got {weight_temperature}. The paper uses "
                "1; null gives all rows the same weight."
            )
        if scale not in ("sum", "mean"):
            raise ConfigurationError(
                f"`scale` must be sum or mean: got {scale}. The paper uses sum."
            )
        self.weight_temperature = weight_temperature
        self.scale = scale

    def prepare(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B]`` weights."""
        ours, taught = rollout.student_mask, known(rollout.imitation_mask, "imitation_mask")
        correct, wrong = rollout.correct & ours.any(1), ~rollout.correct & taught.any(1)
        student = self._mean(known(rollout.old_logprobs, "old_logprobs"), ours)
        sums = known(rollout.teacher_logprobs, "teacher_logprobs")
        teacher = self._mean(chunk_share(sums, rollout.chunk_places), taught)
        scores = torch.where(correct, -student, torch.where(wrong, teacher, 0.0))
        members = correct.to(scores.dtype) - wrong.to(scores.dtype)
        return by_group(rollout, self._weights, scores, members).to(rollout.rewards.dtype)

    def __call__(self, batch: RolloutBatch, gap: Tensor) -> Tensor:
        """Return w on correct completions, and ``w d`` on wrong ones."""
        weights = super().__call__(batch, gap)
        return torch.where(batch.correct[:, None], weights, weights * gap)

    def _weights(self, scores: Tensor, members: Tensor) -> Tensor:
        """Return ``[P, G]`` weights; ``members`` is 1 for correct, -1 for wrong, 0 for neither."""
        whole = torch.zeros_like(scores)
        for sign in (1, -1):
            of_set = members == sign
            part = shares(scores, of_set)
            size = of_set.sum(1, keepdim=True) if self.scale == "mean" else 1
            whole = whole + part * size
        return whole

    def _mean(self, logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return ``[B]`` means over the tokens of ``mask``, divided by the temperature."""
        if self.weight_temperature is None:
            return torch.zeros_like(logprobs[:, 0])
        total = logprobs.masked_fill(~mask, 0.0).sum(1)
        return total / mask.sum(1).clamp(min=1) / self.weight_temperature


class SCOPE(PolicyObjective):
    """SCOPE: likelihood on correct completions, distillation on wrong ones (arXiv 2604.10688).

    ``-rho w`` per token of a correct completion and ``-rho w d`` of a wrong one, with
    ``rho = pi / pi_old``, ``d = log pi_T - log pi`` without gradient, and weights w that are
    normalised over the correct and over the wrong completions of a group. There is no clip. The
    paper sums over the tokens of a group: that is ``reduction: constant_length`` with an
    ``rl_coef`` of group size times ``max_tokens``.

    Args:
        weight_temperature: see ``RarityWeights``.
        scale: see ``RarityWeights``.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self, weight_temperature: float | None = 1.0, scale: Scale = "sum", **policy: PolicySetting
    ) -> None:
        super().__init__(
            ratio=TokenRatio(1.0, sys.float_info.max),  # no clip
            advantage=RarityWeights(weight_temperature, scale),
            **policy,
        )
