"""One rank's share of a rollout: groups of judged completions, as a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kdrl_lightning.rollout.engine import RolloutEngine, Sampling
from kdrl_lightning.rollout.groups import TEACHER_NOISE, TRAIN_NOISE, Slots, fill_groups
from kdrl_lightning.rollout.loader import rows_at
from kdrl_lightning.rollout.sampler import Judged
from kdrl_lightning.rollout_batch import TEACHER, RolloutBatch, collate

Prompt = tuple[Mapping[str, Any], list[int]]


class SampleAndJudge(Protocol):
    """Samples and judges completions of prompts, one per seed."""

    def __call__(
        self,
        engine: RolloutEngine,
        prompts: list[Prompt],
        seeds: list[list[int]],
        sampling: Sampling,
        source: int,
    ) -> list[Judged]:
        """Return the completions, those of a prompt next to each other."""


@dataclass(frozen=True)
class Source:
    """Who adds completions to a group.

    Attributes:
        source: ``STUDENT`` or ``TEACHER``.
        engine: samples them.
        count: completions per prompt.
        sampling: length and temperature.
    """

    source: int
    engine: RolloutEngine
    count: int
    sampling: Sampling


@dataclass
class Collector:
    """Fills the groups of a rollout with the student's completions, and then the teacher's.

    Attributes:
        slots: which groups there are.
        student: the student's part of each group.
        teacher: the teacher's part of each group.
        mask_truncated: leave completions cut at the token limit out of the loss.
        teacher_seconds: time that the teacher took to generate.
    """

    slots: Slots
    student: Source
    teacher: Source
    mask_truncated: bool = False
    teacher_seconds: float = 0.0

    def collect(
        self,
        rollout: int,
        prompts: Sequence[Prompt],
        rank: int,
        world_size: int,
        sample: SampleAndJudge,
        route: Callable[[Mapping[str, Any]], int],
        pad_id: int,
    ) -> tuple[RolloutBatch, list[list[Judged]], list[list[Judged]]]:
        """Sample this rank's groups of a rollout.

        Args:
            rollout: its index.
            prompts: all of them; a slot's follows from the seed.
            rank: of this process.
            world_size: processes.
            sample: samples and judges.
            route: which of several teachers scores the completions of a row.
            pad_id: token behind the end of a row.

        Returns:
            The batch, its groups, and the groups that were replaced.
        """
        groups, replaced = fill_groups(
            self.slots.of_rank(rank, world_size),
            lambda slots, attempt: self._groups(rollout, prompts, slots, attempt, sample),
            self.slots.max_refills,
        )
        judged = [j for group in groups for j in group]
        batch = collate(
            [j.prompt_ids for j in judged],
            [j.completion.ids for j in judged],
            [g for g, group in enumerate(groups) for _ in group],
            pad_id=pad_id,
            rewards=[j.verdict.reward for j in judged],
            correct=[j.verdict.correct for j in judged],
            truncated=[j.completion.truncated for j in judged],
            policy_version=[self.student.engine.version or 0] * len(judged),
            rollout_logprobs=[j.completion.logprobs for j in judged],
            source=[j.source for j in judged],
            teacher_route=[route(j.row) for j in judged],
            temperature=self.student.sampling.temperature,
            engine_exact=self.student.engine.exact,
            mask_truncated=self.mask_truncated,
        )
        return batch, groups, replaced

    def _groups(
        self,
        rollout: int,
        prompts: Sequence[Prompt],
        slots: list[int],
        attempt: int,
        sample: SampleAndJudge,
    ) -> list[list[Judged]]:
        positions = [self.slots.position(rollout, slot, attempt) for slot in slots]
        chosen = [prompts[row] for row in rows_at(positions, len(prompts), self.slots.seed)]
        groups: list[list[Judged]] = [[] for _ in slots]
        for own, stream in ((self.student, TRAIN_NOISE), (self.teacher, TEACHER_NOISE)):
            if not own.count:
                continue
            started = time.perf_counter()
            seeds = [self.slots.seeds(rollout, s, attempt, stream, own.count) for s in slots]
            judged = sample(own.engine, chosen, seeds, own.sampling, own.source)
            for i, group in enumerate(groups):
                group += judged[i * own.count : (i + 1) * own.count]
            if own.source == TEACHER:
                self.teacher_seconds += time.perf_counter() - started
        return groups
