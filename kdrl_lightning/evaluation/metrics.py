"""The metrics of all sets of an evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.evaluation.batch import EvaluationBatch
from kdrl_lightning.evaluation.metric import EvaluationMetric


class EvaluationMetrics:
    """One ``EvaluationMetric`` per set, made as its first batch arrives.

    No module: its states belong to no checkpoint, and a precision must not round them.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, EvaluationMetric] = {}

    def add(self, batch: EvaluationBatch, device: torch.device) -> None:
        """Add a batch; every rank adds as many, in one order, some without prompts."""
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
        """Return ``<stage>/<metric>`` or, for named sets, ``<stage>/<set>/<metric>``; start anew.

        ``<stage>/accuracy`` is then that of the first set. A collective: all ranks must call it.
        """
        values: dict[str, Tensor] = {}
        for name, metric in self._metrics.items():
            computed = metric.compute()
            values.setdefault(f"{stage}/accuracy", computed["accuracy"])
            prefix = f"{stage}/{name}/" if name else f"{stage}/"
            values |= {f"{prefix}{key}": value for key, value in computed.items()}
        self._metrics = {}
        return values
