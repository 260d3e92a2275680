"""Statistics of selective imitation: on which tokens the teacher acts, and how strongly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from kdrl_lightning.callbacks.base import RolloutCallback
from kdrl_lightning.callbacks.reports.plots import plot_imitation
from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import require_count
from kdrl_lightning.losses import k1, k3
from kdrl_lightning.losses.chunks import chunk_share, whole_chunks
from kdrl_lightning.metrics import Histogram, Histograms, StepStats
from kdrl_lightning.objectives.base import Objective, teacher_logprobs
from kdrl_lightning.objectives.ratios import TrustRegionRatio
from kdrl_lightning.rollout_batch import RolloutBatch, upload
from kdrl_lightning.trainer.end_of_run import write_or_warn
from kdrl_lightning.trainer.protocols import is_trial_run, trained
from kdrl_lightning.trainer.run_folder import run_folder

RANGES = {
    "hist/teacher_gap": (-10.0, 10.0),
    "hist/log_ratio": (-2.0, 2.0),
    "hist/log_offset_weight": (-5.0, 5.0),
    "hist/entropy": (0.0, 5.0),
}


class SelectiveImitationStats(RolloutCallback):
    """Logs ``kd/*`` and ``policy/*`` once per optimizer step, token-weighted over all ranks.

    ``docs/statistics.md`` explains each. Histograms of the teacher's gap, the log ratio,
    TRRD's weight and the entropy go to a TensorBoard or W&B logger. At the end it prints a table of
    the first and the last rollouts, and writes ``imitation.png`` into the run folder.

    - ``kd/imitation_frac``: loss tokens on which the teacher enters the gradient;
      ``kd/imitated_completions_frac``, ``kd/imitated_groups_frac``: with at least one such token.
    - ``kd/dead_frac_pos``, ``kd/dead_frac_neg``: of the tokens with a positive (negative)
      advantage, those whose policy gradient the clip removes.
    - ``kd/rewarded_tokens``, ``kd/dead_tokens``: number of the update's tokens with a positive
      advantage that have a policy gradient, and of those whose gradient the clip removes;
      ``kd/punished_tokens``, ``kd/protected_tokens``: the same for a negative advantage.
    - ``kd/reverse_kl``: mean of log pi - log pi_T (k1), an estimate of KL(student || teacher) per
      token; ``kd/reverse_kl_k3`` another that is never negative; ``_correct`` and ``_wrong`` split
      both by the verifier's answer.
    - ``kd/conflict_frac``: of the tokens with an advantage, those on which the teacher's gap has
      the opposite sign; ``kd/strong_conflict_frac``: those on which the gap is also larger than a
      factor of two in probability.
    - ``kd/top_token_agreement``: tokens at which student and teacher have the same most likely
      token.
    - ``kd/teacher_entropy``: the teacher's entropy, to compare with ``policy/entropy``.
    - ``kd/offset_clamp_frac``: tokens on which RLAD's clamp acts; ``kd/offset_weight_max`` and
      ``_p99``: maximum and 99th percentile of TRRD's weight w, its ratio at
      rho = 1: ``(pi_old / pi_T)^(1 - alpha)``, clamped.
    - ``policy/clip_frac``: loss tokens whose ratio lies outside the clip range; ``_low``,
      ``_high``.
    - ``policy/ratio_mean``, ``policy/ratio_max``: mean and maximum of the ratio that is clipped.

    Args:
        histogram_every: rollouts between two histograms.
        table_rollouts: rollouts that each column of the table averages.
    """

    def __init__(self, histogram_every: int = 10, table_rollouts: int = 5) -> None:
        require_count("histogram_every", histogram_every, 1, float("inf"))
        require_count("table_rollouts", table_rollouts, 1, float("inf"))
        self.histogram_every = histogram_every
        self.table_rollouts = table_rollouts
        self.rows: list[dict[str, float]] = []
        self.histograms: dict[int, dict[str, Histogram]] = {}
        self._stats = StepStats()
        self._hist = Histograms(RANGES)
        self._step: dict[str, float] = {}  # of the optimizer step that has just ended
        self._step_histograms: dict[str, Histogram] = {}
        # Group, whether it is used, and whether it is imitated, of each completion of the step: a
        # group may lie in several micro-batches.
        self._groups: list[Tensor] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        if stage == "fit":
            self.rows, self.histograms = [], {}
            self._stats, self._hist = StepStats(), Histograms(RANGES)
            self._groups = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # Lightning's union of step outputs cannot be indexed
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Add a micro-batch; log at the end of the step."""
        if batch.rollout_logprobs is None:  # given completions: there is no rollout to describe
            return
        module = trained(pl_module)
        batch = module.completed(batch)
        micro = MicroBatch(module.objective, batch, outputs["logprobs"], outputs.get("top_ids"))
        add_imitation_stats(self._stats, micro)
        add_histograms(self._hist, micro, outputs["entropy"])
        used, imitated = batch.loss_mask.any(1), micro.imitated.any(1)
        self._groups.append(torch.stack([batch.group_ids, used.long(), imitated.long()]))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the step."""
        module = trained(pl_module)
        self._add_groups(module.device)
        values = self._stats.compute(module.reduce)
        histograms = self._hist.compute(module.reduce)
        weight = histograms.get("hist/log_offset_weight")
        if weight is not None and weight.counts.sum():
            edge = math.exp(weight.quantile(0.99))  # of a bin, above the largest value perhaps
            values["kd/offset_weight_p99"] = min(edge, values["kd/offset_weight_max"])
        module.log_step(self._stats.with_gaps(values))
        self._step, self._step_histograms = values, histograms

    def _add_groups(self, device: torch.device) -> None:
        """Add the share of the step's groups that are imitated."""
        rows = torch.cat(self._groups, 1).T.tolist()
        used = {group for group, is_used, _ in rows if is_used}
        imitated = {group for group, _, is_imitated in rows if is_imitated}
        groups = upload(torch.tensor([g in imitated for g in used], dtype=torch.bool), device)
        self._stats.add_mean("kd/imitated_groups_frac", groups)
        self._groups = []

    def on_rollout_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: int
    ) -> None:
        """Keep the rollout's last values, and its histograms every ``histogram_every`` rollouts."""
        self.rows.append({"rollout": rollout + 1, **self._step})
        if rollout % self.histogram_every == 0:
            self.histograms[rollout + 1] = self._step_histograms
            log_histograms(trainer, self._step_histograms)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table and draw the picture."""
        folder = run_folder(trainer)  # a collective: all ranks
        if not trainer.is_global_zero or not self.rows or is_trial_run(trainer):
            return
        print(table(self.rows, self.table_rollouts))
        file = folder / "imitation.png"
        write_or_warn(file, lambda: plot_imitation(file, self.rows, self.histograms))

    def state_dict(self) -> State:
        """Return rows, histograms and the statistics of an unfinished step."""
        counts = {
            rollout: {name: h.counts.tolist() for name, h in histograms.items()}
            for rollout, histograms in self.histograms.items()
        }
        return {"rows": self.rows, "histograms": counts, "step_stats": self._stats.state_dict()}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore what ``state_dict`` returned."""
        self.rows = state_dict["rows"]
        self._stats.load_state_dict(state_dict.get("step_stats", ()))  # not in older checkpoints
        self.histograms = {
            rollout: {n: Histogram(torch.tensor(c), *RANGES[n]) for n, c in counts.items()}
            for rollout, counts in state_dict["histograms"].items()
        }


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch and what its objective computes from it, each value once.

    Attributes:
        objective: decides what is clipped and what is imitated.
        batch: a scored micro-batch.
        logprobs: ``[B, T]`` of the update's forward pass, detached.
        top_ids: ``[B, T]``, the student's most likely tokens in that pass; None: those at rollout
            time are used.
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
    """Add one micro-batch to ``stats``."""
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
    # The estimates hold for the student's own samples, and say nothing without the context.
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
    """Add one micro-batch to ``histograms``; ``entropy [B, T]`` of its forward pass."""
    batch, mask = micro.batch, micro.batch.loss_mask
    histograms.add("hist/log_ratio", micro.log_ratio, mask)
    histograms.add("hist/entropy", entropy, mask)
    if batch.teacher_logprobs is None:
        return
    gap = teacher_logprobs(batch, micro.logprobs) - micro.logprobs
    histograms.add("hist/teacher_gap", gap, whole_chunks(batch.taught_mask, batch.chunk_places))
    if micro.offset_weight is not None:
        histograms.add("hist/log_offset_weight", micro.offset_weight, batch.student_mask)


def log_histograms(trainer: pl.Trainer, histograms: dict[str, Histogram]) -> None:
    """Send histograms to the loggers that can show them."""
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)  # loggers share no type
        for name, histogram in histograms.items():
            counts, edges = histogram.counts, histogram.edges
            if hasattr(experiment, "add_histogram_raw"):  # TensorBoard
                centers = (edges[1:] + edges[:-1]) / 2
                experiment.add_histogram_raw(
                    name,
                    min=histogram.low,
                    max=histogram.high,
                    num=int(counts.sum()),
                    sum=float((counts * centers).sum()),
                    sum_squares=float((counts * centers.square()).sum()),
                    bucket_limits=edges[1:].tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=trainer.global_step,
                )
            elif type(logger).__name__ == "WandbLogger":
                import wandb  # type: ignore[import-not-found]

                pair = (counts.numpy(), edges.numpy())
                experiment.log({name: wandb.Histogram(np_histogram=pair)})


def table(rows: list[dict[str, float]], rollouts: int) -> str:
    """Render the mean of each statistic over the first and the last rollouts."""
    first, last = rows[:rollouts], rows[-rollouts:]

    def mean(part: list[dict[str, float]], name: str) -> str:
        values = [row[name] for row in part if name in row]
        return f"{sum(values) / len(values):10.3f}" if values else f"{'-':>10}"

    names = sorted({name for row in rows for name in row} - {"rollout"})
    title = "imitation, mean over rollouts"
    width = max(map(len, [title, *names]))
    head = f"  {title:<{width}}  {'first ' + str(len(first)):>10}"
    lines = [f"{head}  {'last ' + str(len(last)):>10}"]
    lines += [f"  {n:<{width}}  {mean(first, n)}  {mean(last, n)}" for n in names]
    return "\n".join(["", *lines])
