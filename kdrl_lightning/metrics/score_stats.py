"""What every optimizer step measures of its scores, whichever forward pass gave them."""

from __future__ import annotations

from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.losses import k3
from kdrl_lightning.losses.logprobs import LOGPROB_FLOOR
from kdrl_lightning.metrics.step_stats import StepStats
from kdrl_lightning.rollout_batch import STUDENT, RolloutBatch

# Sums over a step that are checked and not logged.
BROKEN, READ = "teacher/broken_tokens", "teacher/read_tokens"


def add_score_stats(stats: StepStats, batch: RolloutBatch) -> None:
    """Add what a micro-batch says of engine, student and teacher.

    - ``rollout/mismatch_kl``: k3 on the student's tokens, an unbiased and non-negative estimate of
      KL(engine || trainer) in nats per token.
    - ``kd/floored_frac``: tokens on which the teacher's log-probability was floored at
      ``LOGPROB_FLOOR``.
    - The teacher's values that are not finite, for ``require_finite_teacher``.

    Args:
        stats: of the optimizer step.
        batch: a completed micro-batch; what it does not have is not measured.
    """
    real, teacher = batch.completion_mask, batch.teacher_logprobs
    if batch.rollout_logprobs is not None and batch.old_logprobs is not None:
        mismatch = k3(batch.rollout_logprobs.double(), batch.old_logprobs.double())
        stats.add_mean("rollout/mismatch_kl", mismatch, real & (batch.source == STUDENT)[:, None])
    if teacher is not None:
        stats.add_mean("kd/floored_frac", teacher <= LOGPROB_FLOOR, real)
        stats.add_sum(BROKEN, (~teacher.isfinite()).sum())
        stats.add_sum(READ, real.sum())


def require_finite_teacher(values: dict[str, float]) -> None:
    """Take the counts of the teacher's values out of a step's statistics, and check them.

    Args:
        values: of a step, over all ranks, so that all of them raise.

    Raises:
        TrainingStopped: some of the teacher's log-probabilities are NaN or infinite.
    """
    broken, read = (values.pop(name, 0.0) for name in (BROKEN, READ))
    if broken:
        raise TrainingStopped(
            f"the teacher's log-probabilities must be finite: got {broken:.0f} NaN or infinite of "
            f"{read:.0f}. Check its weights and dtype."
        )
