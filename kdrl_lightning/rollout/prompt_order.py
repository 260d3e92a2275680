"""Which groups make a rollout: slots, their prompts and noise, and refills for flat groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kdrl_lightning.engines.base import noise_seed
from kdrl_lightning.rollout.generation import Judged
from kdrl_lightning.rollout.settings import RolloutSettings
from kdrl_lightning.rollout_batch import flat_groups, reward_dtype

# Streams of noise: student rollouts, evaluation, the teacher's completions, probes of the sync.
TRAIN_NOISE, EVALUATION_NOISE, TEACHER_NOISE, PROBE_NOISE = 0, 1, 2, 3


@dataclass(frozen=True)
class Slots:
    """The places for groups in each rollout, over all processes.

    Prompt and noise of a slot depend on seed, rollout, slot and attempt alone.

    Attributes:
        settings: how many groups a rollout has, in how many mini-batches, and how often a group is
            sampled anew.
        seed: of the run.
    """

    settings: RolloutSettings
    seed: int

    @property
    def count(self) -> int:
        """Groups of a rollout."""
        return self.settings.prompts_per_rollout

    @property
    def minibatches(self) -> int:
        """Parts of a rollout; each rank holds its share of every part."""
        return self.settings.minibatches_per_rollout

    @property
    def max_refills(self) -> int:
        """Attempts beyond the first for a group whose rewards are all equal."""
        return self.settings.max_refills

    def of_rank(self, rank: int, world_size: int) -> list[int]:
        """Return a rank's slots: of every mini-batch, every world-size-th."""
        share = self.count // self.minibatches
        return [
            m * share + g for m in range(self.minibatches) for g in range(rank, share, world_size)
        ]

    def position(self, rollout: int, slot: int, attempt: int) -> int:
        """Return the position in the stream of prompts; no two attempts share one."""
        return (rollout * (1 + self.max_refills) + attempt) * self.count + slot

    def seeds(self, rollout: int, slot: int, attempt: int, stream: int, size: int) -> list[int]:
        """Return the noise of ``size`` completions."""
        index = attempt * self.count + slot
        return [noise_seed(self.seed, stream, rollout, index, k) for k in range(size)]


def fill_groups(
    slots: Sequence[int],
    sample: Callable[[list[int], int], list[list[Judged]]],
    max_refills: int,
) -> tuple[list[list[Judged]], list[list[Judged]]]:
    """Sample a group for each slot, and another prompt's where all rewards are equal.

    DAPO's dynamic sampling (arXiv 2503.14476): a group without variance gives no policy gradient.
    What is still flat after the last refill stays. Rewards are compared in the type of the batch,
    so that a group is replaced if and only if it would get no advantage.

    Args:
        slots: to be filled.
        sample: ``(slots, attempt) -> groups``.
        max_refills: attempts beyond the first.

    Returns:
        The groups in the order of the slots, and those that were replaced.
    """
    filled: dict[int, list[Judged]] = {}
    replaced: list[list[Judged]] = []
    flat = list(slots)
    for attempt in range(max_refills + 1):
        filled.update(zip(flat, sample(flat, attempt), strict=True))
        flat = [s for s in flat if _is_flat(filled[s])]
        if not flat or attempt == max_refills:
            break
        replaced += [filled[s] for s in flat]
    return [filled[s] for s in slots], replaced


def _is_flat(group: Sequence[Judged]) -> bool:
    rewards = torch.tensor([j.verdict.reward for j in group], dtype=reward_dtype())
    return bool(flat_groups(rewards, torch.zeros(len(group), dtype=torch.long)).all())
