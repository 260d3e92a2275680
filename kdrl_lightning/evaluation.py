"""What an evaluation step gets, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from kdrl_lightning.metrics import PassAt1
from kdrl_lightning.rollout.sampler import Judged


@dataclass(frozen=True)
class EvaluationBatch:
    """P prompts with n completions each; P may be 0 on a rank whose shard has run out.

    Attributes:
        judged: ``P * n`` completions, those of a prompt next to each other.
        correct: ``[P, n]`` bool.
        rewards: ``[P, n]``.
        lengths: ``[P, n]`` sampled tokens.
        truncated: ``[P, n]`` bool.
    """

    judged: Sequence[Judged]
    correct: Tensor
    rewards: Tensor
    lengths: Tensor
    truncated: Tensor

    @classmethod
    def from_judged(cls, judged: Sequence[Judged], samples: int) -> EvaluationBatch:
        """Arrange ``samples`` completions per prompt."""

        def table(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).view(-1, samples)

        return cls(
            judged,
            table([j.verdict.correct for j in judged]).bool(),
            table([j.verdict.reward for j in judged]),
            table([len(j.completion.ids) for j in judged]),
            table([j.completion.truncated for j in judged]).bool(),
        )


class EvaluationMetrics(torch.nn.ModuleDict):
    """Accuracy, reward, length and truncation over an evaluation, on all ranks."""

    def __init__(self) -> None:
        super().__init__(
            {
                "accuracy": PassAt1(),
                "reward": MeanMetric(),
                "length_mean": MeanMetric(),
                "truncated_frac": MeanMetric(),
            }
        )

    def add(self, batch: EvaluationBatch, device: torch.device) -> None:
        """Add a batch; it may hold no prompts."""
        metrics = dict(self._metrics())
        metrics["accuracy"].update(batch.correct.to(device))
        for name, values in (
            ("reward", batch.rewards),
            ("length_mean", batch.lengths),
            ("truncated_frac", batch.truncated.float()),
        ):
            mean = values.mean() if values.numel() else torch.zeros(())
            metrics[name].update(mean.to(device), float(values.numel()))

    def take(self, stage: str) -> dict[str, Tensor]:
        """Return the values as ``<stage>/<name>`` and start anew."""
        values = {f"{stage}/{name}": metric.compute() for name, metric in self._metrics()}
        for _, metric in self._metrics():
            metric.reset()
        return values

    def _metrics(self) -> Iterable[tuple[str, Any]]:
        items: Iterable[tuple[str, Any]] = self.items()
        return items
