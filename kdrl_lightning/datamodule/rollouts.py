"""The LightningDataModule: turns prompts into scored rollout batches, on the fly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.common.untyped import Row, State
from kdrl_lightning.datamodule.teacher_prompts import TeacherPrompts
from kdrl_lightning.engines.base import RolloutEngine, Sampling
from kdrl_lightning.engines.transformers_engine import TransformersEngine
from kdrl_lightning.errors import ConfigurationError, require_count
from kdrl_lightning.evaluation import (
    EvalSets,
    EvaluationBatch,
    EvaluationSettings,
    EvaluationSource,
)
from kdrl_lightning.models.end_tokens import warn_of_turn_end
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.prompts.base import Prompts, first_of_each_kind
from kdrl_lightning.prompts.encoding import warn_of_ignored
from kdrl_lightning.prompts.prompt_set import CHECKED_ROWS, PromptRules, PromptSet
from kdrl_lightning.rewards.base import Reward
from kdrl_lightning.rewards.processes.runner import RewardFailures, RewardRunner
from kdrl_lightning.rollout.generation import EncodedPrompt, Judged
from kdrl_lightning.rollout.groups import Collector, GroupShare
from kdrl_lightning.rollout.live import LiveSampler
from kdrl_lightning.rollout.loader import IndexLoader, limited
from kdrl_lightning.rollout.policy import Policy
from kdrl_lightning.rollout.prompt_order import Slots
from kdrl_lightning.rollout.rollouts import RolloutSource
from kdrl_lightning.rollout.settings import RolloutSettings, TeacherCompletions
from kdrl_lightning.rollout.statistics import RolloutWatch
from kdrl_lightning.rollout_batch import STUDENT, TEACHER, RolloutBatch
from kdrl_lightning.trainer.checks.groups import (
    check_completions,
    check_contexts,
    check_groups,
    check_off_policy,
    check_policy,
    check_teacher_completions,
)
from kdrl_lightning.trainer.checks.limits import check_evaluated_batches, overfit_rollouts
from kdrl_lightning.trainer.checks.steps import check_micro_batches, check_steps, longest_that_fits
from kdrl_lightning.trainer.strategies import end_children

# Up to this number, all evaluation prompts are checked before the run and kept with their ids.
EVALUATED_ROWS = 10_000


class RolloutDataModule(pl.LightningDataModule):
    """Turns prompts into rollouts with the current weights, and splits them into micro-batches.

    One rollout serves ``rollout.updates_per_rollout`` optimizer steps; each takes
    ``trainer.accumulate_grad_batches`` micro-batches. ``trainer.global_step`` decides which rollout
    an update uses; a completion's noise depends only on (seed, rollout, prompt, completion).

    Args:
        train_prompts: prompts to train on.
        reward: a ``TaskReward``, or any callable of one ``Sample`` that returns a number or a
            ``Verdict``.
        val_prompts: prompts to validate on: a source, or several sets by name, each with an
            ``EvalSet`` that says how to sample it. ``val/accuracy`` is that of the first set.
        test_prompts: prompts for test and predict, in the same forms; None: ``val_prompts``.
        rollout_engine: samples completions; the transformers engine if None.
        rollout: how to sample rollouts, and how the updates use them.
        teacher_completions: completions per prompt that the teacher adds to the group.
        evaluation: how to sample on evaluation prompts.
        overlong_prompts: whether prompts that are too long stop the run (``refuse``), or are left
            out and counted (``drop``). If there are more than 1,000 training prompts, the run
            checks a sample before it starts, and each prompt when it draws it.
        max_prompt_tokens: longest prompt; None: the context length minus ``max_tokens``.
        reward_failures: the reward of a completion on which the reward function fails, and the
            share of failures that stops the run.
        seed: seed of the prompts' order and of sampling; None: 0, or on the command line
            ``seed_everything``.
    """

    # Lightning sets it before any hook runs.
    trainer: pl.Trainer

    def __init__(
        self,
        train_prompts: Prompts,
        reward: Reward,
        val_prompts: EvalSets | None = None,
        test_prompts: EvalSets | None = None,
        rollout_engine: RolloutEngine | None = None,
        rollout: RolloutSettings = RolloutSettings(),
        teacher_completions: TeacherCompletions = TeacherCompletions(),
        evaluation: EvaluationSettings = EvaluationSettings(),
        overlong_prompts: Literal["refuse", "drop"] = "refuse",
        max_prompt_tokens: int | None = None,
        reward_failures: RewardFailures = RewardFailures(),
        seed: int | None = None,
    ) -> None:
        super().__init__()
        seed = 0 if seed is None else seed
        if max_prompt_tokens is not None:
            require_count("max_prompt_tokens", max_prompt_tokens, 1, float("inf"))
        require_count("seed", seed, 0, float("inf"))
        if overlong_prompts not in ("refuse", "drop"):
            raise ConfigurationError(
                f"`overlong_prompts` must be refuse or drop: got {overlong_prompts}. drop leaves "
                "such rows out."
            )
        check_groups(rollout, teacher_completions.count)
        self.train_prompts = train_prompts
        self.val_prompts = val_prompts
        self.rollout_engine = rollout_engine or TransformersEngine()
        check_off_policy(rollout, self.rollout_engine)
        self.rollout = rollout
        self.collector = Collector(
            Slots(rollout, seed), *_shares(rollout, self.rollout_engine, teacher_completions)
        )
        self.rollouts_per_epoch = self._rollouts_for(len(train_prompts))
        self.evaluation = EvaluationSource(
            val_prompts, test_prompts, evaluation, rollout.max_tokens, seed
        )
        self.seed = seed
        self.rewards = RewardRunner(reward, reward_failures)
        self.live = LiveSampler(self.rewards)
        self.rollouts = RolloutSource(rollout, self.collector, self.live)
        self.overlong_prompts = overlong_prompts
        self.max_prompt_tokens = max_prompt_tokens

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.rollout.updates_per_rollout

    @property
    def max_off_policy_steps(self) -> int:
        """How many rollouts old the weights that sample a rollout may be."""
        return self.rollout.max_off_policy_steps

    @property
    def completions_per_prompt(self) -> int:
        """Size of a group: the student's completions and the teacher's."""
        return self.rollout.group_size + self.collector.teacher.count

    @property
    def teacher_seconds(self) -> float:
        """Seconds that the teacher has taken so far, to generate and to score."""
        return self.rollouts.teacher_seconds

    @property
    def watch(self) -> RolloutWatch:
        """Statistics of the run's rollouts."""
        return self.rollouts.watch

    def rollout_at(self, global_step: int) -> int:
        """Return the index of the rollout that the update after ``global_step`` updates uses."""
        return global_step // self.updates_per_rollout

    def setup(self, stage: str) -> None:
        """Encode the prompts and check what can be checked before training."""
        if self.val_prompts is None:
            self.trainer.limit_val_batches = 0
        # Another module or trainer may have used this object: its rollout and weights are not ours.
        # The cast: Lightning types the module as any LightningModule.
        self.live.join(self.trainer, cast(Policy, self.trainer.lightning_module))
        self.live.max_mean_diff = None  # WeightSyncCheck, which is set up later, may set one
        self.rollouts.reset(stage == "fit")
        name = TrainerFn(stage).value  # Lightning passes the text or the enumeration
        sets = self.evaluation.setup(name, self._encode_evaluated)
        limit = f"limit_{name if name in ('test', 'predict') else 'val'}_batches"
        check_evaluated_batches(self.trainer, limit, [len(one) for one in self.val_dataloader()])
        longest = self.evaluation.longest
        if stage == "fit":
            training = self._set_up_training()
            sets = [training, *sets]
            longest = max(longest, training.bound + self.rollout.max_tokens)
        module = self.live.module
        self.rollout_engine.prepare(module.student_path, longest, module.device)
        if any(not isinstance(row["prompt"], str) for prompts in sets for row, _ in prompts.sample):
            warn_of_turn_end(module.end_tokens, module.tokenizer, module.student_path)
            warn_of_ignored((row for s in sets for row, _ in s.sample), module.tokenizer)
        self.rewards.start()
        for prompts in sets:
            # Run the reward on one row of each kind; let it check all other rows.
            kinds = first_of_each_kind(row for row, _ in prompts.sample)
            prompts.ask(self.rewards.try_once, kinds)
            prompts.require(lambda row: self.rewards.check([row]))
            self.rewards.warn_of_lists([row for row, _ in prompts.sample], prompts.name)
        teacher = module.teacher if stage == "fit" else None
        if teacher is not None and any(context.reads_feedback for context in teacher.contexts):
            self.rewards.require_feedback(first_of_each_kind(row for row, _ in sets[0].sample))

    def _set_up_training(self) -> PromptSet:
        """Encode the training prompts, and check the settings that rollouts depend on."""
        trainer, module, settings = self.trainer, self.live.module, self.rollout
        objective, teacher, share = module.objective, module.teacher, self.collector.teacher
        rules = self._rules(settings.max_tokens)
        if teacher is not None and teacher.vocabulary_rows is not None:
            models = {**rules.vocabularies, "teacher": teacher.vocabulary_rows}
            rules = replace(rules, vocabularies=models)
            self.live.vocabulary_rows = min(models.values())
        of_teacher = TeacherPrompts(module, share)
        rules = replace(rules, refused=[*rules.refused, *of_teacher.of_student])
        prompts = self._encode(self.train_prompts, "train_prompts", rules, CHECKED_ROWS)
        self.rollouts_per_epoch = self._rollouts_for(len(prompts))
        group, length = self.completions_per_prompt, len(self.train_dataloader())
        check_completions(objective, settings, share, self.rewards.reward)
        check_teacher_completions(objective, teacher, share, self.rollout_engine)
        check_policy(objective, teacher, settings, self.rollout_engine)
        self.collector.only_failed = objective.asks_for_failed
        fewest = settings.group_size if objective.asks_for_failed else group
        check_steps(trainer, settings, fewest or group, length)
        check_micro_batches(trainer, settings, group, prompts.longest)
        limit = longest_that_fits(trainer, settings, group)
        prompts.limit(limit, "`max_tokens_per_micro_batch`")
        if teacher is not None:
            prompts.require(teacher.route)  # raises for a row without a teacher
            check_contexts(teacher, group)
            prompts.require(partial(teacher.check_row, tokenizer=module.tokenizer))
            line = teacher.check_rows([row for row, _ in prompts.sample], module.tokenizer)
            if line and trainer.is_global_zero:
                print(f"train_prompts: {line}", flush=True)
        of_teacher.prepare(prompts)
        self.collector.repeat = overfit_rollouts(trainer, settings, length)
        self.rollouts.prompts = prompts
        return prompts

    def teardown(self, stage: str) -> None:
        """End the reward's processes."""
        self.rewards.close()

    def on_exception(self, exception: BaseException) -> None:
        """End the processes that would wait for this one, after callbacks saved the student."""
        end_children(self.trainer.strategy, exception)

    def train_dataloader(self) -> IndexLoader:
        """Return indices of micro-batches within their optimizer step."""
        micro = self.trainer.accumulate_grad_batches
        return IndexLoader(self.rollouts_per_epoch * self.updates_per_rollout * micro, micro)

    def val_dataloader(self) -> list[IndexLoader]:
        """Return indices of evaluation batches, a loader per set."""
        return self.evaluation.loaders(self.trainer.world_size)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def on_after_batch_transfer(
        self, batch: object, dataloader_idx: int
    ) -> RolloutBatch | EvaluationBatch:
        """Turn an index into a batch, on every rank, with the current weights."""
        if not isinstance(batch, int):  # Lightning's transfer does not change ints
            raise TypeError(f"expected an index, got {type(batch).__name__}")
        if self.trainer.training:
            return self.rollouts.micro_batch(batch)
        self.rollouts.drain()
        engine, module = self.rollout_engine, self.live.module
        self.live.sync(engine, module.weights())
        # If one rank fails, the others must not wait for its metrics.
        evaluated = stop_together(
            lambda: self._evaluate(engine, dataloader_idx, batch), module.reduce
        )
        engine.release()
        return evaluated

    def evaluate(
        self,
        weights: ModelWeights,
        temperature: float | None = None,
        prompt_of: Callable[[Row], list[int] | None] | None = None,
        most: float = float("inf"),
    ) -> float:
        """Return a model's accuracy on the first validation set; all ranks must call it.

        Args:
            weights: the model's weights.
            temperature: sampling temperature; None: the set's.
            prompt_of: returns other prompt ids for a row, or None to keep the student's; ids that
                leave no room for the completion are ignored. None: all rows keep the student's.
            most: stop after the batch that reaches this number of prompts.

        Returns:
            The share of correct completions, averaged over prompts; NaN without prompts.
        """
        engine = TransformersEngine()
        self.live.sync(engine, weights)
        correct = torch.zeros(2, dtype=torch.float64)
        each = self.evaluation.val[0].batch_size * self.trainer.world_size
        batches = limited(len(self.val_dataloader()[0]), self.trainer.limit_val_batches)
        for batch in range(int(min(batches, -(-most // each)))):
            table = self._evaluate(engine, 0, batch, temperature, prompt_of).correct.double()
            correct += torch.stack([table.mean(1).sum(), torch.tensor(float(len(table)))])
        solved, prompts = self.live.module.reduce(correct, "sum").tolist()
        return float(solved / prompts) if prompts else float("nan")

    def cannot_evaluate(self, weights: ModelWeights) -> str:
        """Return why ``evaluate`` cannot sample from a model; empty if it can."""
        limits = TransformersEngine().refused_lengths
        rows = weights.model.get_input_embeddings().weight.shape[0]
        return self.evaluation.refused(lambda most: limits(weights.path, most), rows)

    def probe(self) -> RolloutBatch:
        """Sample a few tokens from the weights that the engine holds now; see ``RolloutSource``."""
        return self.rollouts.probe()

    def state_dict(self) -> State:
        """Return the totals and a half-used rollout, if there is one; all ranks must call it."""
        return self.rollouts.state_dict()

    def load_state_dict(self, state_dict: State) -> None:
        """Restore what ``state_dict`` returned; an evaluation needs none of it."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.rollouts.load_state_dict(state_dict)

    def _evaluate(
        self,
        engine: RolloutEngine,
        which: int,
        batch: int,
        temperature: float | None = None,
        prompt_of: Callable[[Row], list[int] | None] | None = None,
    ) -> EvaluationBatch:
        """Sample this rank's rows of one batch of a set; the last batch may have none."""

        def sample(
            prompts: list[EncodedPrompt], seeds: list[list[int]], sampling: Sampling
        ) -> list[Judged]:
            if prompt_of is not None:
                room = self.live.module.context_length - sampling.max_tokens
                other = (prompt_of(row) for row, _ in prompts)
                prompts = [
                    (row, new if new and len(new) <= room else ids)
                    for (row, ids), new in zip(prompts, other, strict=True)
                ]
            return self.live.sample(engine, prompts, seeds, sampling, training=False)

        return self.evaluation.batch(
            which, batch, self.live.ranks, sample, self.rewards.reward, temperature
        )

    def _rollouts_for(self, prompts: int) -> int:
        """Return the rollouts of an epoch; by default each prompt is used once."""
        once = max(prompts // self.rollout.prompts_per_rollout, 1)
        return self.rollout.rollouts_per_epoch or once

    def _rules(self, max_tokens: int) -> PromptRules:
        module = self.live.module
        limit, context = module.context_length - max_tokens, module.context_length
        if self.max_prompt_tokens is not None:
            limit = min(limit, self.max_prompt_tokens)
        return PromptRules(
            limit=limit,
            why=f"context {context}, `max_tokens` {max_tokens}",
            refused=self.rollout_engine.refused_lengths(module.student_path, max_tokens),
            drop=self.overlong_prompts == "drop",
            vocabularies={"student": module.vocabulary_rows},
            ends=module.end_tokens.ids,
        )

    def _encode_evaluated(self, source: Prompts, name: str, max_tokens: int) -> PromptSet:
        return self._encode(source, name, self._rules(max_tokens), EVALUATED_ROWS)

    def _encode(self, source: Prompts, name: str, rules: PromptRules, most: int) -> PromptSet:
        prompts = PromptSet(source, name, self.live.module.tokenizer, rules, most, self.seed)
        if prompts.overlong and self.trainer.is_global_zero:
            print(prompts.left_out(), flush=True)
        return prompts


def _shares(
    settings: RolloutSettings, engine: RolloutEngine, teacher: TeacherCompletions
) -> tuple[GroupShare, GroupShare]:
    """Return how student and teacher sample their completions of each group."""
    sampling = Sampling(settings.max_tokens, settings.temperature)
    teacher_sampling = Sampling(settings.max_tokens, teacher.temperature or settings.temperature)
    return (
        GroupShare(STUDENT, engine, settings.group_size, sampling),
        GroupShare(
            TEACHER, teacher.engine or TransformersEngine(), teacher.count, teacher_sampling
        ),
    )
