"""Measure each rollout, keep the run's totals, and warn if a rollout teaches little."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

# `Any` in the state: Lightning reads checkpoints as dictionaries of `Any`.
from typing import TypeAlias

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
    """

    def __init__(self) -> None:
        self.rollouts = 0
        self.completions = 0
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
        replaced: Sequence[Sequence[Judged]] = (),
    ) -> dict[str, float]:
        """Return the rollout's metrics; warn once of too many flat groups or cut completions.

        Args:
            batch: this rank's completions.
            rewards: runner of the rewards, with the failures since the last rollout.
            seconds: seconds of each phase, by metric name.
            reduce: ``(tensor, operation) -> tensor`` over ranks.
            compares_group: the objective compares the completions of a group.
            replaced: groups of this rank that were replaced because of equal rewards.
        """
        sizes = batch.group_ids.bincount()
        of_student = batch.source == STUDENT
        real = batch.completion_mask & of_student[:, None]
        values = [
            float(of_student.sum()),
            float(batch.rewards[of_student].double().sum()),
            float(batch.correct[of_student].sum()),
            float(real.sum()),
            float(batch.truncated[of_student].sum()),
            float(len(sizes)),
            float(flat_groups(batch.rewards, batch.group_ids).sum()),
            float(rewards.take_failures()),
            float((~of_student).sum()),
            float(batch.rewards[~of_student].double().sum()),
            float(batch.correct[~of_student].sum()),
            float(batch.completion_mask.sum()),
            float(len(replaced)),
            float(sum(len(group) for group in replaced)),
            float(sum(len(j.completion.ids) for group in replaced for j in group)),
        ]
        totals = reduce(torch.tensor(values, dtype=torch.float64), "sum").tolist()
        count, reward, correct, tokens, truncated, groups, flat, failures = totals[:8]
        by_teacher, teacher_reward, teacher_correct, all_tokens = totals[8:12]
        refilled, dropped, dropped_tokens = totals[12:]
        sampled = all_tokens + dropped_tokens
        self.rollouts += 1
        self.completions += int(count + by_teacher + dropped)
        self.tokens += int(sampled)
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        if compares_group:
            self._warn_above(
                MAX_WITHOUT_VARIANCE,
                flat / groups,
                "of the groups have equal rewards and give no policy gradient. Use easier or "
                "harder prompts, a larger `group_size`, or an objective that imitates the teacher "
                "on every token, such as KDRL",
            )
        self._warn_above(
            MAX_TRUNCATED,
            truncated / max(count, 1.0),
            "of the completions are cut at `max_tokens`. Raise it, or use prompts with shorter "
            "answers",
        )
        metrics = {
            "reward/failures": failures,
            "rollout/flat_group_frac": flat / groups,
            "rollout/refilled_groups": refilled,
            "tokens_per_s": sampled / max(seconds.get("time/rollout_s", 0.0), 1e-9),
            **seconds,
        }
        if count:
            metrics |= {
                "reward/mean": reward / count,
                "reward/correct_frac": correct / count,
                "rollout/length_mean": tokens / count,
                "rollout/truncated_frac": truncated / count,
            }
        if by_teacher:
            metrics |= {
                "teacher/reward_mean": teacher_reward / by_teacher,
                "teacher/correct_frac": teacher_correct / by_teacher,
                "teacher/length_mean": (all_tokens - tokens) / by_teacher,
            }
        return metrics

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

    def state_dict(self) -> State:
        """Return the totals."""
        totals = {"rollouts": self.rollouts, "completions": self.completions, "tokens": self.tokens}
        return {**totals, "seconds": self.seconds}

    def load_state_dict(self, state: State) -> None:
        """Restore the totals."""
        self.rollouts, self.completions = state["rollouts"], state["completions"]
        self.tokens, self.seconds = state["tokens"], dict(state["seconds"])

    def _warn_above(self, limit: float, value: float, text: str) -> None:
        if value > limit and text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"{value:.0%} {text}.", stacklevel=2)


def part_means(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Return ``reward/<name>_mean`` of every reward part on any rank; all ranks must call it.

    The mean of a part is over the completions that have it: if each kind of row has its reward,
    completions differ in their parts.
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
