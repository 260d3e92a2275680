"""The groups of a rollout: slots, their prompts and their noise."""

from __future__ import annotations

from dataclasses import dataclass

from kdrl_lightning.engines.base import noise_seed
from kdrl_lightning.rollout.settings import RolloutSettings

# Streams of noise: student rollouts, evaluation, teacher completions, probes of the weight sync.
TRAIN_NOISE, EVALUATION_NOISE, TEACHER_NOISE, PROBE_NOISE = 0, 1, 2, 3


@dataclass(frozen=True)
class Slots:
    """Numbers the groups of each rollout over all processes; a group's number is its slot.

    A group's prompt and noise depend only on seed, rollout, slot and attempt.

    Attributes:
        settings: numbers of groups, mini-batches and refills of a rollout.
        seed: seed of the run.
    """

    settings: RolloutSettings
    seed: int

    @property
    def count(self) -> int:
        """Number of groups in a rollout."""
        return self.settings.prompts_per_rollout

    @property
    def minibatches(self) -> int:
        """Number of mini-batches in a rollout; each rank holds its share of every one."""
        return self.settings.minibatches_per_rollout

    @property
    def max_refills(self) -> int:
        """Attempts after the first for a group with equal rewards."""
        return self.settings.max_refills

    def of_rank(self, rank: int, world_size: int) -> list[int]:
        """Return a rank's slots: every ``world_size``-th slot of every mini-batch."""
        share = self.count // self.minibatches
        return [
            m * share + g for m in range(self.minibatches) for g in range(rank, share, world_size)
        ]

    def position(self, rollout: int, slot: int, attempt: int) -> int:
        """Return a slot's position in the stream of prompts; each attempt has its own."""
        return (rollout * (1 + self.max_refills) + attempt) * self.count + slot

    def seeds(self, rollout: int, slot: int, attempt: int, stream: int, size: int) -> list[int]:
        """Return the seeds of ``size`` completions of a slot; ``stream`` is one of ``*_NOISE``."""
        index = attempt * self.count + slot
        return [noise_seed(self.seed, stream, rollout, index, k) for k in range(size)]
