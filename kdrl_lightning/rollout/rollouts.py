"""The rollouts of a run: each is made when training needs its first micro-batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kdrl_lightning.common.distributed import require_embedded, stop_together
from kdrl_lightning.common.untyped import State
from kdrl_lightning.engines.base import RolloutEngine
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.metrics import peak_gb
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout.draws import DrawCounts
from kdrl_lightning.rollout.generation import EncodedPrompt, Judged
from kdrl_lightning.rollout.groups import Collector
from kdrl_lightning.rollout.live import LiveSampler
from kdrl_lightning.rollout.saved import pack, unpack
from kdrl_lightning.rollout.settings import RolloutSettings
from kdrl_lightning.rollout.statistics import RolloutWatch, part_means
from kdrl_lightning.rollout.updates import (
    FROZEN_TOKENS,
    Cut,
    RolloutPlan,
    Waits,
    plan_updates,
    resume_updates,
)
from kdrl_lightning.rollout_batch import STUDENT, RolloutBatch
from kdrl_lightning.teachers.own_prompt.groups import Group


class RolloutSource:
    """Returns the micro-batches of the rollout that ``trainer.global_step`` belongs to.

    Args:
        settings: how rollouts are sampled and used.
        collector: fills the groups of a rollout.
        live: samples with the run's weights.

    Attributes:
        prompts: all training prompts.
        watch: statistics of the run's rollouts.
        plan: the rollout in use.
    """

    def __init__(self, settings: RolloutSettings, collector: Collector, live: LiveSampler) -> None:
        self.collector = collector
        self.live = live
        self.epochs = settings.epochs_per_rollout
        self.max_micro_tokens: float = settings.max_tokens_per_micro_batch or float("inf")
        self.max_off_policy_steps = settings.max_off_policy_steps
        self.prompts: Sequence[EncodedPrompt] = []
        self.watch = RolloutWatch()
        self.plan: RolloutPlan | None = None
        self._stored: State | None = None
        self._teacher_seconds: float | None = None  # up to the last rollout; None before the first

    @property
    def updates(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.collector.slots.minibatches * self.epochs

    @property
    def teacher_seconds(self) -> float:
        """Seconds that the teacher took so far, to generate and to score."""
        return float(self.collector.teacher_seconds + self.live.module.teacher_seconds)

    def reset(self, fitting: bool) -> None:
        """Forget an earlier run's rollout and weights, and its totals if training begins."""
        self.live.ahead.drop()
        self.plan = self._stored = None
        self.collector.counts = DrawCounts()
        self._teacher_seconds = None
        self.live.rewards.take_failures()
        self.watch = RolloutWatch() if fitting else self.watch
        for share in (self.collector.student, self.collector.teacher):
            share.engine.version = None

    def drain(self) -> None:
        """Wait for completions sampled in advance; all ranks call it before weights change."""
        if self.live.ahead.rollout is not None:
            stop_together(self.live.ahead.wait, self.live.module.reduce)

    def micro_batch(self, micro: int) -> RolloutBatch:
        """Return a micro-batch of the next update; the first one of a rollout makes the rollout."""
        rollout, update = divmod(self.live.trainer.global_step, self.updates)
        if self._teacher_seconds is None:
            self._teacher_seconds = self.teacher_seconds  # after a resume, from the checkpoint
        if self.plan is None or self.plan.rollout != rollout:
            module = self.live.module
            # Free the old rollout, and teachers that its updates ran, before making the new one.
            self.plan = None
            module.frozen.release()
            self.plan = self._make(rollout) if not update else self._resumed(rollout)
            if module.objective.divergence is None:
                module.frozen.release()  # the updates do not run them
        return self.plan.micro_batch(update, micro)

    def probe(self) -> RolloutBatch:
        """Sample a few tokens from the weights that the engine holds now; return them with scores.

        All ranks must call it. ``WeightSyncCheck`` uses it if rollouts come from older weights and
        so cannot show that the sync works.
        """
        (rank, world), module = self.live.ranks, self.live.module
        rollout = self.live.trainer.global_step // self.updates
        batch = stop_together(
            lambda: self.collector.probe(rollout, self.prompts, rank, world, self.live.pad_id),
            module.reduce,
        )
        scored: RolloutBatch = module.score(batch.to(module.device))
        return scored

    def state_dict(self) -> State:
        """Return the totals and a half-used rollout; all ranks must call it."""
        rollout, update = divmod(self.live.trainer.global_step, self.updates)
        stored = self._stored
        if update and self.plan is not None:
            tensors = pack(self.plan.batch, self._slots(), self.live.pad_id)
            stored = {"rollout": rollout, "layout": self._layout(), "tensors": tensors}
        return {
            "watch": self.watch.state_dict(),
            "stored": stored if update else None,
            "teacher_seconds": self.collector.teacher_seconds,
            "draws": self.collector.counts.state_dict(),
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the totals and the half-used rollout.

        Raises:
            ConfigurationError: the rollout is half used, and a setting that decides its completions
                or updates has changed.
        """
        self.watch.load_state_dict(state_dict["watch"])
        self.collector.teacher_seconds = state_dict.get("teacher_seconds", 0.0)
        if "draws" in state_dict:  # not in older checkpoints
            self.collector.counts.load_state_dict(state_dict["draws"])
        self._stored = state_dict["stored"]
        here = self._layout()
        for name, value in {} if self._stored is None else self._stored["layout"].items():
            if here[name] != value:
                raise ConfigurationError(
                    f"`{name}` must be {value} to resume in the middle of a rollout, as this "
                    f"checkpoint does: got {here[name]}. Set {value}, or resume from a checkpoint "
                    "written at the end of a rollout."
                )

    def _resumed(self, rollout: int) -> RolloutPlan:
        """Return the half-used rollout of a checkpoint; without one make the rollout again."""
        if self._stored is None or self._stored["rollout"] != rollout:
            return self._make(rollout)
        module = self.live.module
        batch = unpack(self._stored["tensors"], self._slots()).to(module.device)
        self._stored = None
        # The scores for the remaining updates are stored, unless these updates run the teacher.
        waits = Waits(teacher=module.objective.divergence is not None)
        return resume_updates(batch, rollout, self._cut(), module, waits, self._guard)

    def _make(self, rollout: int) -> RolloutPlan:
        """Make a rollout with the current weights."""
        started, module = time.perf_counter(), self.live.module
        # 1. Give the engines the current weights, unless they sampled this rollout in advance.
        sync_seconds = self._sync(rollout)
        # 2. Sample this rank's groups, and judge the completions.
        batch, groups, replaced = stop_together(lambda: self._collect(rollout), module.reduce)
        self.collector.student.engine.release()
        # 3. Begin to sample the next rollout, if the run samples in advance.
        if self.max_off_policy_steps:
            sync_seconds += self._start_next(rollout + 1)
        sampled = time.perf_counter()
        # 4. Score the completions, let the objective prepare them, and split them into updates.
        batch = batch.to(module.device)
        waits = self._waits(batch)
        plan = plan_updates(batch, rollout, self._cut(), module, waits, self._guard)
        # 5. Measure the rollout; its first micro-batch carries the metrics.
        seconds = {
            "time/sync_s": sync_seconds,
            "time/rollout_s": sampled - started - sync_seconds,
            "time/score_s": time.perf_counter() - sampled,
            # The teacher's part of the two above and of the updates since the last rollout.
            "time/teacher_s": self.teacher_seconds - (self._teacher_seconds or 0.0),
        }
        self._teacher_seconds = self.teacher_seconds
        metrics = self.watch.with_gaps(self._measure(plan, groups, replaced, seconds))
        return plan.with_metrics(metrics, self.live.trainer.global_step % self.updates)

    def _measure(
        self,
        plan: RolloutPlan,
        groups: list[list[Judged]],
        replaced: list[list[Judged]],
        seconds: dict[str, float],
    ) -> dict[str, float]:
        module = self.live.module
        metrics = self.watch.measure(
            plan.batch,
            self.live.rewards,
            seconds,
            module.reduce,
            module.objective.needs_groups,
            replaced,
        )
        metrics |= part_means(j.verdict for g in groups for j in g if j.source == STUDENT)
        metrics["rollout/bad_rows"] = self._bad_rows()
        if self.collector.teacher.count and module.teacher is not None and module.teacher.aligns:
            lost = torch.tensor(float(module.frozen.take_lost()), dtype=torch.float64)
            metrics["rollout/teacher_reencoded_lost"] = float(module.reduce(lost, "sum"))
        dropped = module.frozen.take_dropped()
        metrics |= self.watch.measure_contexts(plan.batch, dropped, module.reduce)
        cost = torch.tensor([plan.padding_frac, peak_gb(module.device)], dtype=torch.float64)
        padding, peak = module.reduce(cost, "max").tolist()
        return metrics | {"rollout/padding_frac": padding, "memory/peak_gb": peak}

    def _bad_rows(self) -> float:
        """Return how many rows all ranks skipped; stop the run if too many were bad."""
        counts = self.collector.counts
        totals = self.live.module.reduce(torch.tensor(counts.take(), dtype=torch.float64), "sum")
        drawn, skipped, bad = totals.tolist()
        counts.judge(drawn, bad)
        return float(skipped)

    def _sync(self, rollout: int) -> float:
        """Sync the engines that need it; return the seconds that the student's engine took."""
        module, share = self.live.module, self.collector.teacher
        seconds = 0.0
        if self.live.ahead.rollout != rollout:
            seconds = self.live.sync(self.collector.student.engine, module.weights())
        teacher = None if share.engine.has_own_weights else module.teacher
        moved = teacher is not None and teacher.moves
        if share.count and (moved or share.engine.version is None):
            self.live.sync(share.engine, self._of_teacher(share.engine))
        return seconds

    def _of_teacher(self, engine: RolloutEngine) -> ModelWeights:
        """Return the weights for the teacher's engine, with the teacher's end tokens."""
        module, teacher = self.live.module, self.live.module.teacher
        if teacher is None:
            return module.weights()
        vocabulary = teacher.own_vocabulary
        if engine.has_own_weights:
            weights = module.weights()
            return (
                weights
                if vocabulary is None
                else replace(weights, end_token_ids=vocabulary.ends, vocab_size=vocabulary.size)
            )
        return teacher.sampling_weights() or module.weights()

    def _start_next(self, rollout: int) -> float:
        """Begin to sample the next rollout while this one trains; return the sync time in s."""
        self.live.ahead.drop()
        if rollout * self.updates >= self.live.trainer.estimated_stepping_batches:
            return 0.0  # the run ends before its first update
        engine = self.collector.student.engine
        seconds = self.live.sync(engine, self.live.module.weights())
        ask = self.live.module.frozen.generation_prompt
        requests = stop_together(
            lambda: self.collector.ahead(rollout, self.prompts, *self.live.ranks, ask),
            self.live.module.reduce,
        )
        self.live.ahead.start(rollout, engine.version or 0, requests)
        return seconds

    def _collect(self, rollout: int) -> tuple[RolloutBatch, list[list[Judged]], list[list[Judged]]]:
        """Return this rank's share of a rollout: the batch, its groups, the groups replaced."""
        module = self.live.module
        # The precision decides the type in which rewards are compared and kept.
        with self.live.trainer.precision_plugin.forward_context():
            batch, groups, replaced = self.collector.collect(
                rollout,
                self.prompts,
                *self.live.ranks,
                self.live.sample,
                module.frozen.route,
                module.frozen.generation_prompt,
                self.live.pad_id,
            )
        batch = module.frozen.write_prompts(batch, self._with_others(rollout, groups))
        module.frozen.accept(batch)
        if self.collector.teacher.count:
            require_embedded(batch.completion_ids, module.vocabulary_rows)
        return batch, groups, replaced

    def _with_others(self, rollout: int, groups: list[list[Judged]]) -> list[Group]:
        """Return the groups for the teacher's contexts, if needed with rows of other prompts."""
        teacher = self.live.module.frozen.active
        if teacher is None or not any(context.reads_others for context in teacher.contexts):
            return [Group(attempts) for attempts in groups]
        others = self.collector.others(rollout, self.prompts, *self.live.ranks)
        return [Group(attempts, row) for attempts, row in zip(groups, others, strict=True)]

    def _waits(self, batch: RolloutBatch) -> Waits:
        """Return which scores the updates compute anyway and ``prepare`` does not read.

        With several epochs there are none: a replay needs scores from before the first update.
        """
        objective, once = self.live.module.objective, self.epochs == 1
        runs_teacher = once and objective.divergence is not None
        return Waits(
            student=once and not objective.reads_old_scores(batch),
            teacher=runs_teacher and not objective.reads_teacher_scores(batch),
        )

    def _cut(self) -> Cut:
        frozen = self.live.module.frozen
        other = frozen.active is not None and frozen.active.has_own_prompt
        return Cut(
            minibatches=self.collector.slots.minibatches,
            epochs=self.epochs,
            micro_batches=self.live.trainer.accumulate_grad_batches,
            max_tokens=self.collector.student.sampling.max_tokens,
            max_micro_tokens=self.max_micro_tokens,
            frozen_tokens=min(FROZEN_TOKENS, self.max_micro_tokens) if frozen.joins else 0.0,
            teacher=frozen.active if other else None,
        )

    def _guard(self, work: Callable[[], RolloutBatch]) -> RolloutBatch:
        """Score with the frozen models; if a teacher on a server fails on one rank, stop all."""
        module = self.live.module
        return work() if module.frozen.collective else stop_together(work, module.reduce)

    def _slots(self) -> list[int]:
        return self.collector.slots.of_rank(*self.live.ranks)

    def _layout(self) -> dict[str, int]:
        """Return the settings that decide which completions a rollout has and when it uses them."""
        slots = self.collector.slots
        return {
            "seed": slots.seed,
            "prompts_per_rollout": slots.count,
            "group_size": self.collector.student.count,
            "teacher_completions": self.collector.teacher.count,
            "minibatches_per_rollout": slots.minibatches,
            "epochs_per_rollout": self.epochs,
        }
