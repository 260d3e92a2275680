"""Measures how the teacher and the clip act on the tokens of a micro-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kdrl_lightning.losses import k1, k3
from kdrl_lightning.losses.teacher_chunks import chunk_share, whole_chunks
from kdrl_lightning.metrics import Histograms, StepStats
from kdrl_lightning.objectives.base import Objective, teacher_logprobs
from kdrl_lightning.objectives.ratios import TrustRegionRatio
from kdrl_lightning.rollout_batch import RolloutBatch


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch, and what its objective computes from it, each value only once.

    Attributes:
        objective: decides which tokens are clipped and which are imitated.
        batch: a scored micro-batch.
        logprobs: ``[B, T]``, the student's in the update's forward pass, detached.
        top_ids: ``[B, T]``, the student's most likely tokens in that pass; None: use those at
            rollout time, if known.
    """

    objective: Objective
    batch: RolloutBatch
    logprobs: Tensor
    top_ids: Tensor | None = None

    @cached_property
    def log_ratio(self) -> Tensor:
        """``[B, T]`` log of the ratio that is clipped."""
        return self.objective.log_ratio(self.batch, self.logprobs)

    @cached_property
    def imitated(self) -> Tensor:
        """``[B, T]`` bool: loss tokens on which the teacher enters the gradient."""
        return self.objective.imitated(self.batch, self.logprobs) & self.batch.loss_mask

    @cached_property
    def offset_weight(self) -> Tensor | None:
        """``[B, T]`` log of TRRD's weight w, its ratio at rho = 1; None without TRRD."""
        anchored = any(getattr(p, "anchored", False) for p in self.objective.parts())
        if self.batch.old_logprobs is None or not anchored:
            return None
        return self.objective.log_ratio(self.batch, self.batch.old_logprobs)


def add_imitation_stats(stats: StepStats, micro: MicroBatch) -> None:
    """Add the ``kd/*`` and ``policy/*`` statistics of one micro-batch to ``stats``."""
    objective, batch, logprobs = micro.objective, micro.batch, micro.logprobs
    mask, imitated = batch.loss_mask, micro.imitated
    ratio = micro.log_ratio.exp()
    stats.add_mean("policy/ratio_mean", ratio, mask)
    stats.add_max("policy/ratio_max", ratio, mask)
    stats.add_mean("kd/imitation_frac", imitated, mask)
    stats.add_mean("kd/imitated_completions_frac", imitated.any(1), mask.any(1))
    outside = objective.outside(batch, logprobs)
    if outside is not None:
        below, above = outside
        stats.add_mean("policy/clip_frac", above | below, mask)
        stats.add_mean("policy/clip_frac_low", below, mask)
        stats.add_mean("policy/clip_frac_high", above, mask)
        advantages = objective.token_advantages(batch, logprobs)
        dead = objective.dead(batch, logprobs, advantages)
        up, down = mask & (advantages > 0), mask & (advantages < 0)
        stats.add_mean("kd/dead_frac_pos", dead, up)
        stats.add_mean("kd/dead_frac_neg", dead, down)
        fates = {"rewarded": up & ~dead, "dead": up & dead}
        fates |= {"punished": down & ~dead, "protected": down & dead}
        for fate, tokens in fates.items():
            stats.add_sum(f"kd/{fate}_tokens", tokens.count_nonzero())
    if batch.teacher_logprobs is not None:
        _add_teacher(stats, micro)


def _add_teacher(stats: StepStats, micro: MicroBatch) -> None:
    batch, logprobs, places = micro.batch, micro.logprobs, micro.batch.chunk_places
    teacher = teacher_logprobs(batch, logprobs)
    # The estimates hold for tokens that the student sampled, if the teacher has its context.
    taught = batch.taught_mask
    mask = whole_chunks(taught & batch.student_mask, places)
    correct = batch.correct[:, None]
    masks = {"": mask, "_correct": mask & correct, "_wrong": mask & ~correct}
    for name, value in (
        ("kd/reverse_kl", chunk_share(k1(logprobs, teacher), places)),
        ("kd/reverse_kl_k3", chunk_share(k3(logprobs, teacher), places)),
    ):
        for which, where in masks.items():
            stats.add_mean(name + which, value, where)
    if batch.advantages is not None:
        wanted = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None]
        gap = teacher - logprobs
        against, used = gap * wanted < 0, mask & (wanted != 0)
        stats.add_mean("kd/conflict_frac", against, used)
        stats.add_mean("kd/strong_conflict_frac", against & (gap.abs() > math.log(2)), used)
    if batch.teacher_entropy is not None:
        stats.add_mean("kd/teacher_entropy", batch.teacher_entropy, taught)
    best = micro.top_ids
    if best is None and batch.topk_ids is not None:
        best = batch.topk_ids[..., 0]
    if batch.teacher_top_ids is not None and best is not None:
        same = batch.teacher_top_ids == best
        stats.add_mean("kd/top_token_agreement", same, taught)
    if batch.old_logprobs is None:
        return
    if micro.offset_weight is not None:
        stats.add_max("kd/offset_weight_max", micro.offset_weight.exp(), mask)
    for part in micro.objective.parts():
        cut = part.clamped(batch, logprobs) if isinstance(part, TrustRegionRatio) else None
        if cut is not None:
            stats.add_mean("kd/offset_clamp_frac", cut, mask)


def add_histograms(histograms: Histograms, micro: MicroBatch, entropy: Tensor) -> None:
    """Add one micro-batch to ``histograms``; ``entropy [B, T]`` is of its forward pass."""
    batch, mask = micro.batch, micro.batch.loss_mask
    histograms.add("hist/log_ratio", micro.log_ratio, mask)
    histograms.add("hist/entropy", entropy, mask)
    if batch.teacher_logprobs is None:
        return
    gap = teacher_logprobs(batch, micro.logprobs) - micro.logprobs
    histograms.add("hist/teacher_gap", gap, whole_chunks(batch.taught_mask, batch.chunk_places))
    if micro.offset_weight is not None:
        histograms.add("hist/log_offset_weight", micro.offset_weight, batch.student_mask)
