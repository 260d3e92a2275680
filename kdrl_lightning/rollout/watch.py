"""Measures each rollout, keeps the run's totals, and warns of two silent ways to learn nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kdrl_lightning.rewards.base import RewardRunner
from kdrl_lightning.rollout_batch import RolloutBatch

MAX_TRUNCATED, MAX_WITHOUT_VARIANCE = 0.5, 0.8


class RolloutWatch:
    """Statistics of rollouts over all ranks.

    Attributes:
        rollouts: rollouts made.
        tokens: tokens sampled.
        seconds: spent in each phase, by metric name.
    """

    def __init__(self) -> None:
        self.rollouts = 0
        self.tokens = 0
        self.seconds: dict[str, float] = {}
        self._warned: set[str] = set()

    def measure(
        self,
        batch: RolloutBatch,
        rewards: RewardRunner,
        seconds: Mapping[str, float],
        reduce: Callable[[Tensor, str], Tensor],
        compares_group: bool = True,
    ) -> dict[str, float]:
        """Return the rollout's metrics, and warn once for each way in which it is wasted.

        Args:
            batch: this rank's scored completions.
            rewards: its failures are reported.
            seconds: time of each phase.
            reduce: ``(tensor, operation) -> tensor`` over ranks.
            compares_group: the objective learns from differences within a group.
        """
        sizes = batch.group_ids.bincount()
        low = torch.full((len(sizes),), torch.inf, device=batch.rewards.device)
        high = -low
        low = low.scatter_reduce(0, batch.group_ids, batch.rewards, "amin")
        high = high.scatter_reduce(0, batch.group_ids, batch.rewards, "amax")
        real = batch.completion_mask
        gap = torch.zeros(())
        if batch.rollout_logprobs is not None and batch.old_logprobs is not None:
            # Unbiased, non-negative estimate (k3) of KL(engine || trainer) on engine samples.
            log_ratio = (batch.old_logprobs - batch.rollout_logprobs).double()
            gap = (log_ratio.expm1() - log_ratio)[real].sum()
        values = [
            float(len(batch)),
            float(batch.rewards.double().sum()),
            float(batch.correct.sum()),
            float(real.sum()),
            float(batch.truncated.sum()),
            float(len(sizes)),
            float((low == high).sum()),
            float(gap),
            float(rewards.failures),
        ]
        totals = reduce(torch.tensor(values, dtype=torch.float64), "sum").tolist()
        count, reward, correct, tokens, truncated, groups, flat, mismatch, failures = totals
        self.rollouts += 1
        self.tokens += int(tokens)
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        if compares_group:
            self._warn_above(
                MAX_WITHOUT_VARIANCE,
                flat / groups,
                "of the groups have equal rewards and give no policy gradient. Take easier or "
                "harder prompts, a larger `group_size`, or an objective with a dense teacher term",
            )
        self._warn_above(
            MAX_TRUNCATED,
            truncated / count,
            "of the completions are cut at `max_tokens`. Raise it, or shorten the prompts' task",
        )
        return {
            "reward/mean": reward / count,
            "reward/correct_frac": correct / count,
            "reward/failures": failures,
            "rollout/length_mean": tokens / count,
            "rollout/truncated_frac": truncated / count,
            "rollout/flat_group_frac": flat / groups,
            "rollout/mismatch_kl": mismatch / tokens,
            "tokens_per_s": tokens / max(seconds.get("time/rollout_s", 0.0), 1e-9),
            **seconds,
        }

    def _warn_above(self, limit: float, value: float, text: str) -> None:
        if value > limit and text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"{value:.0%} {text}.", stacklevel=2)
