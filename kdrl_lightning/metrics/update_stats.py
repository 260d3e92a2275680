"""The metrics of every optimizer step, whichever forward pass gave its scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.losses import k3
from kdrl_lightning.losses.logprobs import LOGPROB_FLOOR
from kdrl_lightning.losses.teacher_chunks import chunk_sizes
from kdrl_lightning.metrics.step_stats import Reduce, StepStats
from kdrl_lightning.rollout_batch import STUDENT, RolloutBatch

# Sums over a step that `finish` checks, but does not log.
BROKEN, READ = "teacher/broken_tokens", "teacher/read_tokens"


class UpdateStats:
    """Adds up the metrics of an optimizer step over its micro-batches.

    - ``loss/total`` and each ``loss/<term>``: the step's loss, and its terms without coefficients.
    - ``policy/entropy``: nats per loss token.
    - ``rollout/mismatch_kl``: k3 on the student's tokens, an unbiased and non-negative estimate of
      KL(engine || trainer) in nats per token.
    - ``kd/floored_frac``: share of the tokens with a teacher log-probability at ``LOGPROB_FLOOR``.
    - If the teacher has another tokenizer: ``kd/unaligned_frac`` is the share of the student's
      tokens without a teacher score; ``kd/chunk_tokens_mean`` and ``_max`` are tokens per chunk.

    Attributes:
        loss: loss of the last finished step, over all ranks.
    """

    def __init__(self) -> None:
        self.loss = 0.0
        self._stats = StepStats()

    def add(
        self, batch: RolloutBatch, entropy: Tensor, loss: Tensor, terms: Mapping[str, Tensor]
    ) -> None:
        """Add a micro-batch.

        Args:
            batch: the micro-batch with all scores; a field that is None is not measured.
            entropy: ``[B, T]`` nats, from the update's forward pass.
            loss: this micro-batch's scalar share of the step's loss.
            terms: this micro-batch's scalar share of each term, by name.
        """
        self._stats.add_sum("loss/total", loss)
        for name, value in terms.items():
            self._stats.add_sum(f"loss/{name}", value)
        self._stats.add_mean("policy/entropy", entropy, batch.loss_mask)
        self._add_scores(batch)

    def _add_scores(self, batch: RolloutBatch) -> None:
        real, teacher = batch.completion_mask, batch.teacher_logprobs
        if batch.rollout_logprobs is not None and batch.old_logprobs is not None:
            mismatch = k3(batch.rollout_logprobs.double(), batch.old_logprobs.double())
            of_student = real & (batch.source == STUDENT)[:, None]
            self._stats.add_mean("rollout/mismatch_kl", mismatch, of_student)
        if teacher is not None:
            self._add_teacher(batch, teacher)
            self._stats.add_sum(BROKEN, (~teacher.isfinite()).sum())
            self._stats.add_sum(READ, real.sum())

    def _add_teacher(self, batch: RolloutBatch, teacher: Tensor) -> None:
        real, places = batch.completion_mask, batch.chunk_places
        if places is None:
            self._stats.add_mean("kd/floored_frac", teacher <= LOGPROB_FLOOR, real)
            return
        tokens = batch.student_mask
        self._stats.add_mean("kd/unaligned_frac", places < 0, tokens)
        sizes, first = chunk_sizes(places), tokens & (places == 0)
        self._stats.add_mean("kd/chunk_tokens_mean", sizes, first)
        self._stats.add_max("kd/chunk_tokens_max", sizes, first)

    def finish(self, reduce: Reduce | None = None) -> dict[str, float | None]:
        """Return the step's values and start again; None for names only an earlier step measured.

        Call it before the optimizer step, so that a broken teacher changes no weight.

        Args:
            reduce: ``(tensor, "sum" or "max") -> tensor`` over ranks; None for one process.

        Raises:
            TrainingStopped: the teacher's log-probabilities are not finite on some rank; all ranks
                raise it.
        """
        values = self._stats.compute(reduce)
        broken, read = (values.pop(name, 0.0) for name in (BROKEN, READ))
        if broken:
            raise TrainingStopped(
                f"the teacher's log-probabilities must be finite: got {broken:.0f} NaN or infinite "
                f"of {read:.0f}. Check its weights and dtype."
            )
        self.loss = values["loss/total"]
        return self._stats.with_gaps(values)

    def state_dict(self) -> list[str]:
        """Return the names measured so far, see ``StepStats``."""
        return self._stats.state_dict()

    def load_state_dict(self, state_dict: Iterable[str]) -> None:
        """Restore the names, so that the next step leaves a gap for those it does not measure."""
        self._stats.load_state_dict(state_dict)
