"""Sample one rank's share of a rollout: groups of judged completions, as a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeAlias

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.engines.base import RolloutEngine, Sampling
from kdrl_lightning.errors import BadRow
from kdrl_lightning.rollout.draws import MOST_TRIES, DrawCounts, draw
from kdrl_lightning.rollout.generation import EncodedPrompt, Judged
from kdrl_lightning.rollout.live import Request
from kdrl_lightning.rollout.loader import rows_at
from kdrl_lightning.rollout.prompt_order import (
    PROBE_NOISE,
    TEACHER_NOISE,
    TRAIN_NOISE,
    Slots,
)
from kdrl_lightning.rollout.refills import fill_groups
from kdrl_lightning.rollout_batch import TEACHER, RolloutBatch, collate

# Enough tokens to notice that weights differ, and few compared with a rollout.
PROBES, PROBE_TOKENS = 4, 64


# Maps a row and the student's prompt ids to the prompt ids after which the teacher samples.
Ask: TypeAlias = Callable[[Row, list[int]], list[int]]


class SampleAndJudge(Protocol):
    """Samples and judges completions of prompts, one per seed."""

    def __call__(
        self,
        engine: RolloutEngine,
        prompts: list[EncodedPrompt],
        seeds: list[list[int]],
        sampling: Sampling,
        source: int,
    ) -> list[Judged]:
        """Return the completions; completions of a prompt are next to each other."""


@dataclass(frozen=True)
class GroupShare:
    """How many completions student or teacher adds to each group, and how they are sampled.

    Attributes:
        source: ``STUDENT`` or ``TEACHER``.
        engine: samples the completions.
        count: completions per prompt.
        sampling: length and temperature.
    """

    source: int
    engine: RolloutEngine
    count: int
    sampling: Sampling

    def asked(self, prompts: list[EncodedPrompt], ask: Ask) -> list[EncodedPrompt]:
        """Return the prompts for the engine: the student's, or those that ``ask`` gives."""
        if self.source != TEACHER:
            return prompts
        return [(row, ask(row, ids)) for row, ids in prompts]


@dataclass
class Collector:
    """Fills the groups of a rollout with completions of the student, then of the teacher.

    A group is all completions of one prompt. Groups are numbered; the number is the group's slot.

    Attributes:
        slots: decides the prompt and the sampling noise of each slot.
        student: the student's completions of each group.
        teacher: the teacher's completions of each group.
        teacher_seconds: seconds that the teacher's engine took to generate.
        repeat: number of rollouts after which the prompts repeat; 0: once all have been used.
        only_failed: the teacher adds completions only to groups in which all of the student's are
            wrong.
        counts: counts of the rows drawn and skipped.
        latest: this rank's completions of the last rollout, in the order of the batch.
    """

    slots: Slots
    student: GroupShare
    teacher: GroupShare
    teacher_seconds: float = 0.0
    repeat: int = 0
    only_failed: bool = False
    counts: DrawCounts = field(default_factory=DrawCounts)
    latest: Sequence[Judged] = ()

    def collect(
        self,
        rollout: int,
        prompts: Sequence[EncodedPrompt],
        rank: int,
        world_size: int,
        sample: SampleAndJudge,
        route: Callable[[Row], int],
        ask: Ask,
        pad_id: int,
    ) -> tuple[RolloutBatch, list[list[Judged]], list[list[Judged]]]:
        """Return this rank's groups of a rollout, sampled and judged.

        Args:
            rollout: index of the rollout.
            prompts: all prompts; the seed decides which of them a slot gets.
            rank: rank of this process.
            world_size: number of processes.
            sample: samples and judges completions.
            route: returns the index of the teacher that scores the completions of a row.
            ask: returns the prompt after which the teacher samples.
            pad_id: padding token.

        Returns:
            The batch, its groups, and the groups that were replaced.

        Raises:
            TrainingStopped: ``MOST_TRIES`` consecutive rows of a slot cannot be used.
        """
        # 1. Sample a group for each of this rank's slots; replace groups with equal rewards.
        groups, replaced = fill_groups(
            self.slots.of_rank(rank, world_size),
            partial(self._groups, rollout, prompts, sample, ask),
            self.slots.max_refills,
        )
        # 2. Put the completions of a group next to each other.
        self.latest = judged = [j for group in groups for j in group]
        # 3. Build the batch, with the teacher that is to score each row.
        batch = collate(
            [j.prompt_ids for j in judged],
            [j.completion.ids for j in judged],
            [g for g, group in enumerate(groups) for _ in group],
            pad_id=pad_id,
            rewards=[j.verdict.reward for j in judged],
            correct=[j.verdict.correct for j in judged],
            truncated=[j.completion.truncated for j in judged],
            policy_version=[self._version(j) for j in judged],
            rollout_logprobs=[j.completion.logprobs for j in judged],
            source=[j.source for j in judged],
            teacher_route=[route(j.row) for j in judged],
            mask_truncated=self.slots.settings.mask_truncated,
        )
        if self.slots.settings.mask_flat_groups:
            batch = batch.without_flat_groups()
        return self._sampled(batch), groups, replaced

    def others(
        self, rollout: int, prompts: Sequence[EncodedPrompt], rank: int, world_size: int
    ) -> list[Row]:
        """Return a row of another prompt for each of this rank's groups.

        This is the row that the slot gets in the next rollout. It does not depend on the number of
        ranks, and no other slot of this rollout has it.
        """
        slots = self.slots.of_rank(rank, world_size)
        return [row for row, _ in self._prompts(rollout + 1, prompts, slots)[0]]

    def ahead(
        self, rollout: int, prompts: Sequence[EncodedPrompt], rank: int, world_size: int, ask: Ask
    ) -> list[Request]:
        """Return those requests of ``collect`` that engines can answer while the student trains.

        Refills must wait for rewards, and so must a teacher that answers only failed prompts.
        """
        slots = self.slots.of_rank(rank, world_size)
        chosen = self._prompts(rollout, prompts, slots)[0]
        return [
            Request(share.engine, [p for _, p in share.asked(chosen, ask)], seeds, share.sampling)
            for share, seeds in self._seeded(rollout, slots)
            if share.engine.supports_async and not self._waits(share)
        ]

    def probe(
        self,
        rollout: int,
        prompts: Sequence[EncodedPrompt],
        rank: int,
        world_size: int,
        pad_id: int,
    ) -> RolloutBatch:
        """Return short completions of a few of a rollout's prompts, without rewards."""
        slots = self.slots.of_rank(rank, world_size)[:PROBES]
        asked = [ids for _, ids in self._prompts(rollout, prompts, slots)[0]]
        seeds = [self.slots.seeds(rollout, slot, 0, PROBE_NOISE, 1) for slot in slots]
        engine, sampling = self.student.engine, self.student.sampling
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, PROBE_TOKENS))
        made = [c for (c,) in engine.generate(asked, seeds, sampling)]
        batch = collate(
            asked,
            [c.ids for c in made],
            list(range(len(made))),
            pad_id=pad_id,
            policy_version=[engine.version or 0] * len(made),
            rollout_logprobs=[c.logprobs for c in made],
        )
        return self._sampled(batch)

    def _sampled(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the temperature and the ``exact`` flag of the student's engine."""
        student = self.student
        return batch.replace(
            temperature=student.sampling.temperature, engine_exact=student.engine.exact
        )

    def _waits(self, share: GroupShare) -> bool:
        """Return whether a share is sampled only after the student's completions are judged."""
        return self.only_failed and share.source == TEACHER

    def _version(self, judged: Judged) -> int:
        version = judged.completion.version
        return self.student.engine.version or 0 if version is None else version

    def _prompts(
        self, rollout: int, prompts: Sequence[EncodedPrompt], slots: list[int], attempt: int = 0
    ) -> tuple[list[EncodedPrompt], list[BadRow]]:
        """Return the slots' prompts, and the rows skipped before them.

        If a row cannot be used, the slot takes its row of the next rollout. No other slot of this
        rollout has that row, so ranks need not communicate.
        """
        first = rollout % self.repeat if self.repeat else rollout
        chosen, skipped = [], []
        for slot in slots:
            positions = (self.slots.position(first + k, slot, attempt) for k in range(MOST_TRIES))
            rows = (rows_at([p], len(prompts), self.slots.seed)[0] for p in positions)
            prompt, bad = draw(prompts, rows)
            chosen.append(prompt)
            skipped += bad
        return chosen, skipped

    def _seeded(
        self, rollout: int, slots: list[int], attempt: int = 0
    ) -> Iterator[tuple[GroupShare, list[list[int]]]]:
        for share, stream in ((self.student, TRAIN_NOISE), (self.teacher, TEACHER_NOISE)):
            if size := share.count:
                yield share, [self.slots.seeds(rollout, s, attempt, stream, size) for s in slots]

    def _groups(
        self,
        rollout: int,
        prompts: Sequence[EncodedPrompt],
        sample: SampleAndJudge,
        ask: Ask,
        slots: list[int],
        attempt: int,
    ) -> list[list[Judged]]:
        chosen, skipped = self._prompts(rollout, prompts, slots, attempt)
        self.counts.add(len(slots), skipped)
        groups: list[list[Judged]] = [[] for _ in slots]
        for share, seeds in self._seeded(rollout, slots, attempt):
            started = time.perf_counter()
            places = [i for i, g in enumerate(groups) if not self._waits(share) or failed(g)]
            asked = share.asked([chosen[i] for i in places], ask)
            noise = [seeds[i] for i in places]
            judged = sample(share.engine, asked, noise, share.sampling, share.source)
            for k, i in enumerate(places):
                made = judged[k * share.count : (k + 1) * share.count]
                # The student scores the teacher's completions after the student's prompt.
                groups[i] += [replace(one, prompt_ids=chosen[i][1]) for one in made]
            if share.source == TEACHER:
                self.teacher_seconds += time.perf_counter() - started
        return groups


def failed(group: Sequence[Judged]) -> bool:
    """Return whether no completion of a group is correct."""
    return not any(one.verdict.correct for one in group)
