"""The metrics of all sets of an evaluation, by set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdrl_lightning.evaluation.batch import EvaluationBatch
from kdrl_lightning.evaluation.metric import EvaluationMetric
from kdrl_lightning.evaluation.sets import AVERAGE


class EvaluationMetrics:
    """Holds one ``EvaluationMetric`` per set, created when the set's first batch arrives.

    This is not a ``Module``, so checkpoints lack its states and no precision rounds them.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, EvaluationMetric] = {}

    def add(self, batch: EvaluationBatch, device: torch.device) -> None:
        """Add a batch, maybe empty; all ranks must add equally many, in the same order."""
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
        ``<stage>/accuracy`` is then the first set's, and ``<stage>/average/<metric>`` the mean over
        the sets. All ranks must call it.
        """
        values: dict[str, Tensor] = {}
        found = {name: metric.compute() for name, metric in self._metrics.items()}
        if len(found) > 1:
            found[AVERAGE] = average(list(found.values()))
        for name, computed in found.items():
            values.setdefault(f"{stage}/accuracy", computed["accuracy"])
            prefix = f"{stage}/{name}/" if name else f"{stage}/"
            values |= {f"{prefix}{key}": value for key, value in computed.items()}
        self._metrics = {}
        return values


def average(sets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean over sets of each metric that all of them have; each set counts the same.

    It leaves out the intervals, which belong to single sets.

    >>> average([{"reward": torch.tensor(0.5)}, {"reward": torch.tensor(1.0), "other": 1}])
    {'reward': tensor(0.7500)}
    """
    names = [name for name in sets[0] if all(name in one for one in sets)]
    intervals = ("accuracy_low", "accuracy_high")
    kept = [name for name in names if name not in intervals]
    return {name: torch.stack([one[name] for one in sets]).mean() for name in kept}
