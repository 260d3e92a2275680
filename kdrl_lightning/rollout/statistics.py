"""Measure each rollout, keep the run's totals, and warn if most of a rollout is of no use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import State
from kdrl_lightning.rewards.base import Verdict
from kdrl_lightning.rewards.processes.runner import RewardRunner
from kdrl_lightning.rollout.generation import Judged
from kdrl_lightning.rollout_batch import STUDENT, RolloutBatch, flat_groups

Sums: TypeAlias = dict[str, tuple[float, int]]  # total and count of each reward part
MAX_TRUNCATED, MAX_WITHOUT_VARIANCE, MAX_WITHOUT_CONTEXT = 0.5, 0.8, 0.95


class RolloutWatch:
    """Measures rollouts over all ranks and keeps the run's totals.

    Attributes:
        rollouts: rollouts made.
        completions: completions sampled, with those of replaced groups.
        tokens: tokens of these completions.
        seconds: seconds spent in each phase, by metric name.
        names: names of all metrics so far.
    """

    def __init__(self) -> None:
        self.rollouts = 0
        self.completions = 0
        self.tokens = 0
        self.seconds: dict[str, float] = {}
        self.names: set[str] = set()
        self._warned: set[str] = set()

    def measure(
        self,
        batch: RolloutBatch,
        rewards: RewardRunner,
        seconds: Mapping[str, float],
        reduce: Callable[[Tensor, str], Tensor],
        compares_group: bool = True,
        replaced: Sequence[Sequence[Judged]] = (),
    ) -> dict[str, float]:
        """Return the rollout's metrics; warn once of too many flat groups or truncated completions.

        Args:
            batch: this rank's completions.
            rewards: runner of the rewards, with the failures since the last rollout.
            seconds: seconds of each phase, by metric name.
            reduce: ``(tensor, operation) -> tensor`` over ranks.
            compares_group: whether the objective compares the completions of a group.
            replaced: groups of this rank that were replaced because of equal rewards.
        """
        here = _counts(batch, rewards.take_failures(), replaced)
        counts = _Counts(*reduce(torch.tensor(here, dtype=torch.float64), "sum").tolist())
        sampled = counts.all_tokens + counts.dropped_tokens
        self.rollouts += 1
        self.completions += int(counts.by_student + counts.by_teacher + counts.dropped)
        self.tokens += int(sampled)
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self._warn(counts, compares_group)
        speed = {"tokens_per_s": sampled / max(seconds.get("time/rollout_s", 0.0), 1e-9)}
        return {**counts.metrics(), **speed, **seconds}

    def _warn(self, counts: _Counts, compares_group: bool) -> None:
        if compares_group:
            self._warn_above(
                MAX_WITHOUT_VARIANCE,
                counts.flat_groups / counts.groups,
                "of the groups have equal rewards and give no policy gradient. Use easier or "
                "harder prompts, a larger `group_size`, or an objective that imitates the teacher "
                "on every token, such as KDRL",
            )
        self._warn_above(
            MAX_TRUNCATED,
            counts.truncated / max(counts.by_student, 1.0),
            "of the completions are cut at `max_tokens`. Raise it, or use prompts with shorter "
            "answers",
        )

    def measure_contexts(
        self, batch: RolloutBatch, dropped: int, reduce: Callable[[Tensor, str], Tensor]
    ) -> dict[str, float]:
        """Return the share of completions that the teacher has a context for; warn if it is small.

        All ranks must call it.

        Args:
            batch: this rank's completions.
            dropped: this rank's contexts that were too long or could not be rendered.
            reduce: ``(tensor, operation) -> tensor`` over ranks.

        Returns:
            ``kd/context_frac`` and ``kd/context_dropped_frac``; nothing if the teacher has no
            prompt of its own.
        """
        if batch.has_context is None:
            return {}
        here = [float(batch.has_context.sum()), float(dropped), float(len(batch))]
        having, lost, count = reduce(torch.tensor(here, dtype=torch.float64), "sum").tolist()
        self._warn_above(
            MAX_WITHOUT_CONTEXT,
            1.0 - having / count,
            "of the completions have no context for the teacher and are not imitated. See "
            "`kd/context_dropped_frac`; for siblings use easier prompts, a larger `group_size` or "
            "a lower `threshold`",
        )
        return {"kd/context_frac": having / count, "kd/context_dropped_frac": lost / count}

    def with_gaps(self, metrics: Mapping[str, float]) -> dict[str, float | None]:
        """Return a rollout's metrics, with None for names that only an earlier one measured.

        A rollout may have no completion of the teacher or of the student, or lack a reward part.
        Without None, callbacks would read the values of an earlier rollout.
        """
        gaps = dict.fromkeys(self.names - metrics.keys())
        self.names |= metrics.keys()
        return {**metrics, **gaps}

    def state_dict(self) -> State:
        """Return the totals, and the names that get None if a rollout does not measure them."""
        totals = {"rollouts": self.rollouts, "completions": self.completions, "tokens": self.tokens}
        return {**totals, "seconds": self.seconds, "names": sorted(self.names)}

    def load_state_dict(self, state: State) -> None:
        """Restore what ``state_dict`` returned."""
        self.names = set(state.get("names", ()))  # checkpoints of 0.1 have none
        self.rollouts, self.completions = state["rollouts"], state["completions"]
        self.tokens, self.seconds = state["tokens"], dict(state["seconds"])

    def _warn_above(self, limit: float, value: float, text: str) -> None:
        if value > limit and text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"{value:.0%} {text}.", stacklevel=2)


class _Counts(NamedTuple):
    """Sums over a rollout's completions.

    ``reward``, ``correct``, ``tokens`` and ``truncated`` count the student's completions only.

    Attributes:
        by_student: number of completions that the student sampled.
        groups: number of groups in the batch, without replaced ones.
        failures: calls of the reward that failed.
        all_tokens: tokens of all completions in the batch, student's and teacher's.
        refilled: groups that were replaced because of equal rewards.
        dropped: completions of these groups.
    """

    by_student: float
    reward: float
    correct: float
    tokens: float
    truncated: float
    groups: float
    flat_groups: float
    failures: float
    by_teacher: float
    teacher_reward: float
    teacher_correct: float
    all_tokens: float
    refilled: float
    dropped: float
    dropped_tokens: float

    def metrics(self) -> dict[str, float]:
        """Return the metrics that follow from the counts of all ranks."""
        found = {
            "reward/failures": self.failures,
            "rollout/flat_group_frac": self.flat_groups / self.groups,
            "rollout/refilled_groups": self.refilled,
        }
        if self.by_student:
            found |= {
                "reward/mean": self.reward / self.by_student,
                "reward/correct_frac": self.correct / self.by_student,
                "rollout/length_mean": self.tokens / self.by_student,
                "rollout/truncated_frac": self.truncated / self.by_student,
            }
        if self.by_teacher:
            found |= {
                "teacher/reward_mean": self.teacher_reward / self.by_teacher,
                "teacher/correct_frac": self.teacher_correct / self.by_teacher,
                "teacher/length_mean": (self.all_tokens - self.tokens) / self.by_teacher,
            }
        return found


def _counts(batch: RolloutBatch, failures: int, replaced: Sequence[Sequence[Judged]]) -> _Counts:
    """Return the counts of one rank."""
    student = batch.source == STUDENT
    return _Counts(
        by_student=float(student.sum()),
        reward=float(batch.rewards[student].double().sum()),
        correct=float(batch.correct[student].sum()),
        tokens=float((batch.completion_mask & student[:, None]).sum()),
        truncated=float(batch.truncated[student].sum()),
        groups=float(len(batch.group_ids.bincount())),
        flat_groups=float(flat_groups(batch.rewards, batch.group_ids).sum()),
        failures=float(failures),
        by_teacher=float((~student).sum()),
        teacher_reward=float(batch.rewards[~student].double().sum()),
        teacher_correct=float(batch.correct[~student].sum()),
        all_tokens=float(batch.completion_mask.sum()),
        refilled=float(len(replaced)),
        dropped=float(sum(len(group) for group in replaced)),
        dropped_tokens=float(sum(len(j.completion.ids) for group in replaced for j in group)),
    )


def part_means(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Return ``reward/<name>_mean`` of every reward part on any rank; all ranks must call it.

    The mean of a part is over the completions that have it: completions differ in their parts if
    different rows have different rewards.
    """
    here: Sums = {}
    for verdict in verdicts:
        for name, value in verdict.parts.items():
            total, count = here.get(name, (0.0, 0))
            here[name] = total + value, count + 1
    totals: dict[str, list[tuple[float, int]]] = {}
    for sums in _gather(here):
        for name, pair in sums.items():
            totals.setdefault(name, []).append(pair)
    return {
        f"reward/{name}_mean": sum(total for total, _ in pairs) / sum(count for _, count in pairs)
        for name, pairs in sorted(totals.items())
    }


def _gather(here: Sums) -> list[Sums]:
    # We gather objects, not tensors, because ranks can have parts of different names.
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [here]
    ranks: list[Sums] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(ranks, here)
    return ranks
