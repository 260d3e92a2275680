"""Checks that the engine samples from the student's current weights."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import torch
from torch import Tensor

from kdrl_lightning.callbacks.base import RolloutCallback, updates_per_rollout
from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.engines.agreement import bound_of
from kdrl_lightning.errors import TrainingStopped, require_between, require_count
from kdrl_lightning.rollout_batch import STUDENT, RolloutBatch
from kdrl_lightning.trainer.protocols import TrainedModule, rollout_data, trained


class WeightSyncCheck(RolloutCallback):
    """Stops a run if its rollouts do not come from the student's current weights.

    The data module pushes weights once per rollout; this callback checks the result. At a rollout's
    first update, the ``policy_version`` of each completion must be the trainer's step, and the
    engine's log-probabilities must agree with the trainer's on the same tokens. If the trainer's
    come only from the update's forward pass, the callback compares before the backward pass.

    With ``max_off_policy_steps`` 1 the version may be one rollout older. The log-probabilities of
    such completions differ as expected, so every ``every_n_rollouts`` rollouts the callback samples
    a few fresh completions and compares those. It logs ``rollout/staleness`` (optimizer steps),
    ``rollout/logprob_diff_mean`` and ``rollout/logprob_diff_max``.

    Args:
        max_mean_diff: bound on the mean absolute difference of log-probabilities, in nats. None:
            0.001 if trainer and engine compute in float32 or above, and 0.1 if one of them computes
            in 16 bits. With equal weights the difference is about 1e-6 in float32 and 1e-2 in
            bfloat16; with outdated weights it is larger.
        every_n_rollouts: number of rollouts from one sample of fresh completions to the next, if
            rollouts are stale. If they are not, the callback compares every rollout.
    """

    def __init__(self, max_mean_diff: float | None = None, every_n_rollouts: int = 10) -> None:
        if max_mean_diff is not None:
            require_between("max_mean_diff", max_mean_diff, 0.0, float("inf"))
        require_count("every_n_rollouts", every_n_rollouts, 1, float("inf"))
        self.max_mean_diff = max_mean_diff
        self.every_n_rollouts = every_n_rollouts
        self._waiting: RolloutBatch | None = None

    def bound(self, precision: str, engine_dtype: torch.dtype | None) -> float:
        """Return the bound for the trainer's precision and the engine's dtype.

        >>> check = WeightSyncCheck()
        >>> check.bound("32-true", torch.float32), check.bound("bf16-mixed", None)
        (0.001, 0.1)
        """
        if self.max_mean_diff is not None:
            return self.max_mean_diff
        return bound_of(precision, engine_dtype)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset the state; pass the bound to the check that the data runs before it samples."""
        self._waiting = None
        data = rollout_data(trainer)
        if data is not None:
            data.live.max_mean_diff = self.max_mean_diff

    def on_rollout_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: RolloutBatch, rollout: int
    ) -> None:
        """Check a rollout at its first micro-batch; if one rank has to stop, all do."""
        module, data = trained(pl_module), rollout_data(trainer)
        if data is None:
            return
        stop_together(lambda: self.check_version(trainer, module, batch), module.reduce)
        if batch.old_logprobs is None:
            self._waiting = batch  # the update's forward pass computes them
        else:
            stop_together(lambda: self.compare(trainer, module, batch), module.reduce)
        if not data.rollout.max_off_policy_steps:
            return
        # `due` is equal on all ranks. After the last rollout no weights were pushed.
        due = rollout % self.every_n_rollouts == 0
        if due and data.rollout_engine.version == trainer.global_step:
            fresh = data.probe()
            stop_together(lambda: self.compare(trainer, module, fresh), module.reduce)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Compare the log-probabilities of the update's forward pass."""
        if self._waiting is None:
            return
        module = trained(pl_module)
        batch, self._waiting = module.completed(self._waiting), None
        stop_together(lambda: self.compare(trainer, module, batch), module.reduce)

    def check_version(
        self, trainer: pl.Trainer, pl_module: TrainedModule, batch: RolloutBatch
    ) -> None:
        """Check the age of this rank's completions.

        Raises:
            TrainingStopped: they are too old.
        """
        data = rollout_data(trainer)
        rollouts = 0 if data is None else data.rollout.max_off_policy_steps
        allowed = rollouts * updates_per_rollout(trainer)
        staleness = int(trainer.global_step - batch.policy_version.min())
        pl_module.log_step({"rollout/staleness": float(staleness)})
        if staleness > allowed:
            limit = f"at most {allowed} optimizer steps old" if allowed else "from current weights"
            raise TrainingStopped(
                f"rollouts must be {limit} (`max_off_policy_steps` {rollouts}): got completions "
                f"that are {staleness} optimizer steps old at step {trainer.global_step}. Check "
                "the engine's update_weights."
            )

    def compare(self, trainer: pl.Trainer, pl_module: TrainedModule, batch: RolloutBatch) -> None:
        """Compare log-probabilities, engine against trainer, on completions of current weights.

        Raises:
            TrainingStopped: they differ by more than the bound.
        """
        if batch.rollout_logprobs is None or batch.old_logprobs is None:
            return
        fresh = (batch.source == STUDENT) & (batch.policy_version == trainer.global_step)
        compared = batch.completion_mask & fresh[:, None]
        gap = (batch.rollout_logprobs - batch.old_logprobs).abs().masked_fill(~compared, 0.0)
        sums = compared.sum(), gap.sum() / compared.sum(), gap.max()
        tokens, mean, largest = torch.stack([value.double() for value in sums]).tolist()
        if not tokens:
            return
        values = {"rollout/logprob_diff_mean": mean, "rollout/logprob_diff_max": largest}
        pl_module.log_step(values)
        data = rollout_data(trainer)
        dtype = None if data is None else data.rollout_engine.dtype
        bound = self.bound(str(trainer.precision), dtype)
        if not mean <= bound:
            row, place = divmod(int(gap.nan_to_num(torch.inf).argmax()), gap.shape[1])
            raise TrainingStopped(
                f"the engine's log-probabilities must agree with the trainer's within {bound} nats "
                f"on average: got {mean:.3g} at step {trainer.global_step}. They differ most at "
                f"token {place} of completion {row} (id {int(batch.completion_ids[row, place])}): "
                f"engine {float(batch.rollout_logprobs[row, place]):.4g}, trainer "
                f"{float(batch.old_logprobs[row, place]):.4g}. The engine has different weights, "
                "samples with settings that change its log-probabilities, or computes this "
                "architecture differently."
            )


def __getattr__(name: str) -> type[WeightSyncCheck]:
    if name == "WeightSync":
        text = "`WeightSync` is now `WeightSyncCheck`: 0.3 removes the old name."
        warnings.warn(text, FutureWarning, stacklevel=2)
        return WeightSyncCheck
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
