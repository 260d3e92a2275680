"""The steps and hooks of a module in validation, test and prediction."""

from __future__ import annotations

from typing import Any

from kdrl_lightning.evaluation.batch import EvaluationBatch
from kdrl_lightning.evaluation.metrics import EvaluationMetrics

# `Any`: Lightning's attributes and arguments; Lightning is not imported here.


class EvaluationSteps:
    """The evaluation steps of a ``LightningModule``: they measure judged completions.

    List it before ``LightningModule`` among a class's bases, so that its hooks replace Lightning's.
    """

    device: Any
    log_dict: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_metrics = EvaluationMetrics()

    def validation_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch of judged completions to the metrics."""
        self.eval_metrics.add(batch, self.device)

    def test_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch of judged completions to the metrics."""
        self.eval_metrics.add(batch, self.device)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/*``."""
        self.log_dict(self.eval_metrics.take("val"), sync_dist=True)  # equal on all ranks already

    def on_test_epoch_end(self) -> None:
        """Log ``test/*``."""
        self.log_dict(self.eval_metrics.take("test"), sync_dist=True)  # equal on all ranks already

    def predict_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Return a row per completion, with its prompt's columns, reward and verdict."""
        return batch.predictions()
