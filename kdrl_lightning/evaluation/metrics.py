"""The metrics of all sets of an evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.evaluation.batch import EvaluationBatch
from kdrl_lightning.evaluation.metric import EvaluationMetric


class EvaluationMetrics:
    """Holds one ``EvaluationMetric`` per set, created when the set's first batch arrives.

    This is not a ``Module``, so that no checkpoint holds its states and no precision rounds them.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, EvaluationMetric] = {}

    def add(self, batch: EvaluationBatch, device: torch.device) -> None:
        """Add a batch; all ranks must add the same number, in the same order, even if empty."""
        name = batch.of.name
        if name not in self._metrics:
            self._metrics[name] = EvaluationMetric(batch.of.ks).to(device)
        self._metrics[name].add(
            batch.rows,
            batch.correct.to(device),
            batch.rewards.to(device),
            batch.lengths.to(device),
            batch.truncated.to(device),
            batch.answer_ids.to(device),
        )

    def take(self, stage: str) -> dict[str, Tensor]:
        """Return the values of all sets, and reset.

        Names are ``<stage>/<metric>`` or, for named sets, ``<stage>/<set>/<metric>``;
        ``<stage>/accuracy`` is then the first set's. A collective: all ranks must call it.
        """
        values: dict[str, Tensor] = {}
        for name, metric in self._metrics.items():
            computed = metric.compute()
            values.setdefault(f"{stage}/accuracy", computed["accuracy"])
            prefix = f"{stage}/{name}/" if name else f"{stage}/"
            values |= {f"{prefix}{key}": value for key, value in computed.items()}
        self._metrics = {}
        return values
