"""Where the teacher acts: statistics of selective imitation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from kdrl_lightning.losses import k1
from kdrl_lightning.metrics import StepStats
from kdrl_lightning.objectives.base import Objective
from kdrl_lightning.rollout_batch import RolloutBatch


class SelectiveImitationStats(pl.Callback):
    """Logs ``kd/*`` and ``policy/*`` once per optimizer step, token-weighted over all ranks.

    - ``kd/imitation_frac``: loss tokens on which the teacher enters the gradient. KDRL and
      distillation: tokens of the KL term; RLAD: tokens with an advantage that the fence leaves
      alive.
    - ``kd/dead_frac_pos``, ``kd/dead_frac_neg``: of the tokens with a positive (negative)
      advantage, those whose policy gradient the fence removes.
    - ``kd/reverse_kl``: mean of log pi - log pi_T, an estimate of KL(student || teacher) per token;
      ``kd/reverse_kl_correct`` and ``_wrong`` split it by the verifier's answer.
    - ``kd/conflict_frac``: of the tokens with an advantage, those that the teacher would push the
      other way.
    - ``kd/offset_clamp_frac``: tokens whose teacher offset RLAD clamps.
    - ``policy/clip_frac``: loss tokens whose ratio lies outside the clip range.
    - ``policy/ratio_mean``, ``policy/ratio_max``: of the ratio that is clipped.
    """

    def __init__(self) -> None:
        self._stats = StepStats()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a micro-batch; log at the end of the step."""
        if batch.old_logprobs is None:
            return
        add_imitation_stats(self._stats, pl_module.objective, batch, outputs["logprobs"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            pl_module.log_dict(self._stats.compute(pl_module.reduce))


def add_imitation_stats(
    stats: StepStats, objective: Objective, batch: RolloutBatch, logprobs: Tensor
) -> None:
    """Add one micro-batch to ``stats``.

    Args:
        stats: receives the values.
        objective: decides what is clipped and what is imitated.
        batch: a scored micro-batch.
        logprobs: ``[B, T]`` of the update's forward pass, detached.
    """
    mask = batch.loss_mask
    ratio = objective.log_ratio(batch, logprobs).exp()
    stats.add_mean("policy/ratio_mean", ratio, mask)
    stats.add_max("policy/ratio_max", ratio, mask)
    stats.add_mean("kd/imitation_frac", objective.imitated(batch, logprobs), mask)
    advantages = batch.advantages
    if advantages is not None and advantages.dim() == 1:
        advantages = advantages[:, None].expand_as(ratio)
    clip_low = getattr(objective, "clip_low", None)
    clip_high = getattr(objective, "clip_high", None)
    if advantages is not None and clip_low is not None and clip_high is not None:
        above, below = ratio > 1 + clip_high, ratio < 1 - clip_low
        stats.add_mean("policy/clip_frac", above | below, mask)
        stats.add_mean("kd/dead_frac_pos", above, mask & (advantages > 0))
        stats.add_mean("kd/dead_frac_neg", below, mask & (advantages < 0))
    if batch.teacher_logprobs is None:
        return
    gap = k1(logprobs, batch.teacher_logprobs)
    correct = batch.correct[:, None]
    stats.add_mean("kd/reverse_kl", gap, mask)
    stats.add_mean("kd/reverse_kl_correct", gap, mask & correct)
    stats.add_mean("kd/reverse_kl_wrong", gap, mask & ~correct)
    if advantages is not None:
        stats.add_mean("kd/conflict_frac", gap * advantages > 0, mask & (advantages != 0))
    clamp = getattr(objective, "offset_clamp", None)
    if clamp is not None and batch.old_logprobs is not None:
        offset = batch.old_logprobs - batch.teacher_logprobs
        stats.add_mean("kd/offset_clamp_frac", offset.abs() > clamp, mask)
