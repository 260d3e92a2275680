"""What an evaluation step gets: judged completions of some prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
