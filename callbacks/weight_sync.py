"""Proof, on every rollout, that the engine sampled from the current weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from kdrl_lightning.errors import TrainingStopped, require_between
from kdrl_lightning.rollout.together import stop_together
from kdrl_lightning.rollout_batch import STUDENT


class WeightSync(pl.Callback):
    """Stops a run whose rollouts do not come from the student as it is.

    The data module pushes weights before every rollout; this callback checks the result. At a
    rollout's first update the version that travels with each completion must be the trainer's step,
    and the engine's log-probabilities must agree with the trainer's own on the same tokens. Logs
    ``rollout/staleness`` (optimizer steps) and ``rollout/logprob_diff_max``.

    Args:
        max_mean_diff: bound on the mean absolute difference of log-probabilities, in nats. Equal
            float32 weights differ by about 1e-6, bfloat16 engines by about 1e-2, stale weights by
            more.
    """

    def __init__(self, max_mean_diff: float = 0.1) -> None:
        require_between("max_mean_diff", max_mean_diff, 0.0, float("inf"))
        self.max_mean_diff = max_mean_diff

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check a rollout at its first micro-batch; where one rank has to stop, all do."""
        if batch.metrics:
            stop_together(lambda: self.check(trainer, pl_module, batch), pl_module.reduce)

    def check(self, trainer: pl.Trainer, pl_module: Any, batch: Any) -> None:
        """Check this rank's completions.

        Raises:
            TrainingStopped: they are stale, or their log-probabilities are another policy's.
        """
        staleness = int(trainer.global_step - batch.policy_version.min())
        pl_module.log("rollout/staleness", float(staleness))
        if staleness:
            raise TrainingStopped(
                f"rollouts must come from the current weights: got completions that are "
                f"{staleness} optimizer steps old at step {trainer.global_step}. "
                "Check the engine's update_weights."
            )
        if batch.rollout_logprobs is None or batch.old_logprobs is None:
            return
        own = batch.completion_mask & (batch.source == STUDENT)[:, None]
        if not own.any():
            return
        gap = (batch.rollout_logprobs - batch.old_logprobs).abs()[own]
        pl_module.log("rollout/logprob_diff_max", gap.max())
        if not float(gap.mean()) <= self.max_mean_diff:
            raise TrainingStopped(
                f"the engine's log-probabilities must agree with the trainer's within "
                f"{self.max_mean_diff} nats on average: got {float(gap.mean()):.3g} (largest "
                f"{float(gap.max()):.3g}) at step {trainer.global_step}. The engine holds other "
                "weights, or samples with settings that change its log-probabilities."
            )
