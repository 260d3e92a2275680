"""Statistics of selective imitation: on which tokens the teacher acts, and how strongly."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch import Tensor

from kdrl_lightning.callbacks.base import RolloutCallback, StepOutputs
from kdrl_lightning.callbacks.reports.loggers import log_histograms
from kdrl_lightning.callbacks.reports.plots import plot_imitation
from kdrl_lightning.callbacks.reports.summary import imitation_table
from kdrl_lightning.callbacks.reports.token_stats import (
    MicroBatch,
    add_histograms,
    add_imitation_stats,
)
from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import require_count
from kdrl_lightning.metrics import Histogram, Histograms, StepStats
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

    ``docs/statistics.md`` explains each statistic. The callback sends histograms of the teacher's
    gap, the log ratio, TRRD's weight and the entropy to a TensorBoard or W&B logger. At the end it
    prints a table of the first and the last rollouts, and writes ``imitation.png`` into the run
    folder.

    - ``kd/imitation_frac``: share of the loss tokens on which the teacher enters the gradient;
      ``kd/imitated_completions_frac``, ``kd/imitated_groups_frac``: share of the completions
      (groups) with at least one such token.
    - ``kd/dead_frac_pos``, ``kd/dead_frac_neg``: share of the tokens with a positive (negative)
      advantage whose policy gradient the clip removes.
    - ``kd/rewarded_tokens``, ``kd/dead_tokens``: number of the update's tokens with a positive
      advantage that have a policy gradient, and of those whose gradient the clip removes;
      ``kd/punished_tokens``, ``kd/protected_tokens``: the same for a negative advantage.
    - ``kd/reverse_kl``: mean of log pi - log pi_T (k1), an estimate of KL(student || teacher) per
      token; ``kd/reverse_kl_k3``: another estimate, which is never negative; ``_correct`` and
      ``_wrong`` split both by the verifier's verdict.
    - ``kd/conflict_frac``: share of the tokens with an advantage on which the teacher's gap has the
      opposite sign; ``kd/strong_conflict_frac``: the same, only if the gap is larger than a factor
      of two in probability.
    - ``kd/top_token_agreement``: share of the tokens at which student and teacher have the same
      most likely token.
    - ``kd/teacher_entropy``: the teacher's entropy, to compare with ``policy/entropy``.
    - ``kd/offset_clamp_frac``: share of the tokens on which RLAD's clamp acts;
      ``kd/offset_weight_max`` and ``_p99``: maximum and 99th percentile of TRRD's weight w, its
      ratio at rho = 1: ``(pi_old / pi_T)^(1 - alpha)``, clamped.
    - ``policy/clip_frac``: share of the loss tokens whose ratio lies outside the clip range;
      ``_low``, ``_high``: below and above it.
    - ``policy/ratio_mean``, ``policy/ratio_max``: mean and maximum of the ratio that is clipped.

    Args:
        histogram_every: number of rollouts from one histogram to the next.
        table_rollouts: number of rollouts that each column of the table averages.
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
        # For each completion of the step: its group, and whether it has a loss token and an
        # imitated token. We count groups per step, because one may lie in several micro-batches.
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
        outputs: StepOutputs,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Add a micro-batch; log at the end of the step."""
        if batch.rollout_logprobs is None:  # completions of a data set, not of a rollout
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
            edge = math.exp(weight.quantile(0.99))  # a bin's edge, perhaps above the largest value
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
        """Keep the values of the rollout's last step; every ``histogram_every``, its histograms."""
        self.rows.append({"rollout": rollout + 1, **self._step})
        if rollout % self.histogram_every == 0:
            self.histograms[rollout + 1] = self._step_histograms
            log_histograms(trainer.loggers, self._step_histograms, trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table and draw the picture."""
        folder = run_folder(trainer)  # a collective: all ranks
        if not trainer.is_global_zero or not self.rows or is_trial_run(trainer):
            return
        print(imitation_table(self.rows, self.table_rollouts))
        file = folder / "imitation.png"
        write_or_warn(file, lambda: plot_imitation(file, self.rows, self.histograms))

    def state_dict(self) -> State:
        """Return rows, histograms, and the names that get None if a step does not measure them."""
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
