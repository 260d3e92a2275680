"""The LightningDataModule: prompts to scored rollout batches, on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from kdrl_lightning.distributed import stop_together
from kdrl_lightning.engines.base import RolloutEngine, Sampling
from kdrl_lightning.engines.transformers_engine import TransformersEngine
from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.evaluation import EvalSets, EvaluationBatch, EvaluationSource, NamedSet
from kdrl_lightning.models.end_tokens import warn_of_turn_end
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.prompts.base import Prompts, first_of_each_kind
from kdrl_lightning.prompts.prompt_set import CHECKED_ROWS, PromptRules, PromptSet
from kdrl_lightning.rewards.base import Reward
from kdrl_lightning.rewards.processes.runner import RewardRunner
from kdrl_lightning.rollout.groups import Collector, Source
from kdrl_lightning.rollout.live import LiveSampler
from kdrl_lightning.rollout.loader import IndexLoader, limited
from kdrl_lightning.rollout.prompt_order import Slots
from kdrl_lightning.rollout.rollouts import RolloutSource
from kdrl_lightning.rollout.statistics import RolloutWatch
from kdrl_lightning.rollout_batch import STUDENT, TEACHER, RolloutBatch
from kdrl_lightning.trainer.checks import (
    check_groups,
    check_micro_batches,
    check_off_policy,
    check_rollout_settings,
    longest_that_fits,
    overfit_rollouts,
)

# Evaluation prompts up to as many are all checked before the run, and kept with their ids.
EVALUATED_ROWS = 10_000


class RolloutDataModule(pl.LightningDataModule):
    """Turns prompts into rollouts with the current weights, and cuts them into micro-batches.

    One rollout serves ``minibatches_per_rollout * epochs_per_rollout`` optimizer steps; each takes
    ``trainer.accumulate_grad_batches`` micro-batches. The rollout to use follows from
    ``trainer.global_step``, the noise of a completion from (seed, rollout, prompt, completion).

    Args:
        train_prompts: prompts to train on.
        reward: a ``TaskReward``, or any callable of one ``Sample`` that returns a number or a
            ``Verdict``.
        val_prompts: prompts to validate on: a source, or several sets by name, whose ``EvalSet``
            says how they are sampled. ``val/accuracy`` is that of the first.
        test_prompts: likewise for test and predict; None: those of ``val_prompts``.
        rollout_engine: samples completions; the transformers engine if None.
        prompts_per_rollout: prompts of one rollout, over all processes.
        group_size: completions per prompt that the student samples; 0 with ``teacher_completions``
            trains on the teacher's alone.
        teacher_completions: completions per prompt that the teacher adds to the group; they are
            rewarded like the student's.
        teacher_temperature: sampling temperature of the teacher; None: ``temperature``.
        teacher_engine: samples the teacher's completions; the transformers engine if None.
        max_refills: how often a group whose rewards are all equal is replaced by another prompt's
            (DAPO's dynamic sampling). Prompts kept for refills are skipped where none is needed.
        max_tokens: longest completion, the end token included.
        temperature: sampling temperature of rollouts; log-probabilities are taken at it.
        minibatches_per_rollout: disjoint parts of a rollout, whole groups, one update each.
        epochs_per_rollout: how often a rollout is replayed.
        max_off_policy_steps: how many rollouts old the weights may be that sample one. 0: none. 1:
            the next rollout is sampled while the present one trains, by an engine that can
            (``VLLMServerEngine``); importance weights on sampled tokens correct for it.
        rollouts_per_epoch: rollouts of one trainer epoch (validation follows it); None: as many as
            take each prompt once.
        mask_truncated: leave completions cut at ``max_tokens`` out of the loss.
        max_tokens_per_micro_batch: tokens, padding included, for which memory is enough. The worst
            case is checked before training, and no micro-batch is larger; None: no limit.
        val_batch_size: prompts per evaluation batch and process.
        val_samples: completions per evaluation prompt.
        val_temperature: 0 is greedy.
        val_k: of pass@k and majority@k, each from 1 to ``val_samples``; None: ``val_samples``,
            where that is above 1.
        overlong_prompts: a prompt that is too long stops the run (``refuse``), or is left out and
            counted (``drop``). Of more than 1,000 training prompts a sample is looked at before the
            run, and each when it is drawn.
        max_prompt_tokens: longest prompt; None: what the context leaves beside ``max_tokens``.
        max_reward_failure_frac: stop when the reward fails on more than this part of a rollout.
        failed_reward: what a completion gets on which the reward fails; it counts as wrong.
        seed: order of prompts and noise of sampling; None: 0, on the command line
            ``seed_everything``.
    """

    trainer: Any  # attached by Lightning before any hook runs

    def __init__(
        self,
        train_prompts: Prompts,
        reward: Reward,
        val_prompts: EvalSets | None = None,
        test_prompts: EvalSets | None = None,
        rollout_engine: RolloutEngine | None = None,
        prompts_per_rollout: int = 32,
        group_size: int = 8,
        teacher_completions: int = 0,
        teacher_temperature: float | None = None,
        teacher_engine: RolloutEngine | None = None,
        max_refills: int = 0,
        max_tokens: int = 512,
        temperature: float = 1.0,
        minibatches_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        max_off_policy_steps: int = 0,
        rollouts_per_epoch: int | None = None,
        mask_truncated: bool = False,
        max_tokens_per_micro_batch: int | None = None,
        val_batch_size: int = 256,
        val_samples: int = 1,
        val_temperature: float = 0.0,
        val_k: Sequence[int] | None = None,
        overlong_prompts: Literal["refuse", "drop"] = "refuse",
        max_prompt_tokens: int | None = None,
        max_reward_failure_frac: float = 0.1,
        failed_reward: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        seed = 0 if seed is None else seed
        counts = {
            "prompts_per_rollout": prompts_per_rollout,
            "max_tokens": max_tokens,
            "minibatches_per_rollout": minibatches_per_rollout,
            "epochs_per_rollout": epochs_per_rollout,
            "max_prompt_tokens": 1 if max_prompt_tokens is None else max_prompt_tokens,
            "rollouts_per_epoch": 1 if rollouts_per_epoch is None else rollouts_per_epoch,
            "max_tokens_per_micro_batch": (
                1 if max_tokens_per_micro_batch is None else max_tokens_per_micro_batch
            ),
        }
        for name, value in counts.items():
            require_between(name, value, 1, float("inf"))
        for name, value in {
            "group_size": group_size,
            "teacher_completions": teacher_completions,
            "max_refills": max_refills,
            "seed": seed,
        }.items():
            require_between(name, value, 0, float("inf"))
        if overlong_prompts not in ("refuse", "drop"):
            raise ConfigurationError(
                f"`overlong_prompts` must be refuse or drop: got {overlong_prompts}."
            )
        check_groups(group_size, teacher_completions, temperature, teacher_temperature)
        self.train_prompts = train_prompts
        self.val_prompts = val_prompts
        self.rollout_engine = rollout_engine or TransformersEngine()
        check_off_policy(max_off_policy_steps, self.rollout_engine)
        self.max_off_policy_steps = max_off_policy_steps
        self.prompts_per_rollout = prompts_per_rollout
        self.group_size = group_size
        self.teacher_completions = teacher_completions
        self.teacher_engine = teacher_engine or TransformersEngine()
        self.train_sampling = Sampling(max_tokens, temperature)
        self.collector = Collector(
            Slots(prompts_per_rollout, minibatches_per_rollout, max_refills, seed),
            Source(STUDENT, self.rollout_engine, group_size, self.train_sampling),
            Source(
                TEACHER,
                self.teacher_engine,
                teacher_completions,
                Sampling(max_tokens, teacher_temperature or temperature),
            ),
            mask_truncated,
        )
        self.minibatches_per_rollout = minibatches_per_rollout
        self.epochs_per_rollout = epochs_per_rollout
        self._one_pass_per_epoch = rollouts_per_epoch is None
        self.rollouts_per_epoch = rollouts_per_epoch or max(
            len(train_prompts) // prompts_per_rollout, 1
        )
        sampled = Sampling(max_tokens, val_temperature)
        default = NamedSet("", [], val_samples, sampled, val_batch_size, tuple(val_k or ()))
        self.evaluation = EvaluationSource(val_prompts, test_prompts, default, seed)
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.seed = seed
        self.rewards = RewardRunner(reward, max_reward_failure_frac, failed_reward)
        self.live = LiveSampler(self.rewards)
        self.rollouts = RolloutSource(
            self.collector,
            self.live,
            epochs_per_rollout,
            max_tokens_per_micro_batch or float("inf"),
            max_off_policy_steps,
        )
        self.overlong_prompts = overlong_prompts
        self.max_prompt_tokens = max_prompt_tokens

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.minibatches_per_rollout * self.epochs_per_rollout

    @property
    def completions_per_prompt(self) -> int:
        """Size of a group: the student's completions and the teacher's."""
        return self.group_size + self.teacher_completions

    @property
    def teacher_seconds(self) -> float:
        """Time that the teacher took so far, to generate and to score."""
        return self.rollouts.teacher_seconds

    @property
    def watch(self) -> RolloutWatch:
        """What the run's rollouts were like."""
        return self.rollouts.watch

    def rollout_at(self, global_step: int) -> int:
        """Index of the rollout that the update after ``global_step`` updates uses."""
        return global_step // self.updates_per_rollout

    def setup(self, stage: str) -> None:
        """Encode the prompts and check what can be checked before training."""
        if self.val_prompts is None:
            self.trainer.limit_val_batches = 0
        # Another module or trainer may have used this object: its rollout and weights are not ours.
        self.live.trainer = self.trainer
        self.live.vocabulary_rows = self.live.module.vocabulary_rows
        self.live.max_mean_diff = None  # WeightSyncCheck, which is set up later, may have one
        self.rollouts.reset(stage == "fit")
        sets = self.evaluation.setup(TrainerFn(stage).value, self._encode_evaluated)
        if stage == "fit":
            sets = [self._set_up_training(), *sets]
        if any(not isinstance(row["prompt"], str) for prompts in sets for row, _ in prompts.sample):
            module = self.live.module
            warn_of_turn_end(module.end_tokens, module.tokenizer, module.student_path)
        self.rewards.start()
        kinds = first_of_each_kind(row for prompts in sets for row, _ in prompts.sample)
        for prompts in sets:
            # The row of each kind is tried with completions, all others are only looked at.
            prompts.ask(self.rewards.try_once, kinds)
            prompts.require(lambda row: self.rewards.check([row]))

    def _set_up_training(self) -> PromptSet:
        """Look at the training prompts, and check the settings that rollouts depend on."""
        trainer, module = self.trainer, self.live.module
        rules = self._rules(self.train_sampling.max_tokens)
        if module.teacher is not None and module.teacher.vocabulary_rows is not None:
            models = {**rules.vocabularies, "teacher": module.teacher.vocabulary_rows}
            rules = replace(rules, vocabularies=models)
            self.live.vocabulary_rows = min(models.values())
        if self.teacher_completions and module.teacher is not None and module.teacher.model_name:
            theirs = self.teacher_engine.refused_lengths(
                module.teacher.model_name, self.train_sampling.max_tokens
            )
            rules = replace(rules, refused=[*rules.refused, *theirs])
        prompts = self._encode(self.train_prompts, "train_prompts", rules, CHECKED_ROWS)
        if self._one_pass_per_epoch:
            self.rollouts_per_epoch = max(len(prompts) // self.prompts_per_rollout, 1)
        check_rollout_settings(trainer, self, module)
        check_micro_batches(trainer, self, prompts.longest)
        prompts.limit(longest_that_fits(trainer, self), "`max_tokens_per_micro_batch`")
        if module.teacher is not None:
            prompts.require(module.teacher.route)  # a row without a teacher is found before the run
        self.collector.repeat = overfit_rollouts(trainer, self)
        self.rollouts.prompts = prompts
        return prompts

    def teardown(self, stage: str) -> None:
        """End the reward's processes."""
        self.rewards.close()

    def train_dataloader(self) -> IndexLoader:
        """Return indices of micro-batches within their optimizer step."""
        micro = self.trainer.accumulate_grad_batches
        return IndexLoader(self.rollouts_per_epoch * self.updates_per_rollout * micro, micro)

    def val_dataloader(self) -> list[IndexLoader]:
        """Return indices of evaluation batches, a loader per set."""
        return self.evaluation.loaders(self.trainer.world_size)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn an index into a batch, on every rank, with the current weights."""
        if not isinstance(batch, int):  # Lightning moves ints as they are
            raise TypeError(f"expected an index, got {type(batch).__name__}")
        if self.trainer.training:
            return self.rollouts.micro_batch(batch)
        self.rollouts.drain()
        engine, module = self.rollout_engine, self.live.module
        self.live.sync(engine, module.weights())
        # A rank that fails must not leave the others waiting for its metrics.
        evaluated = stop_together(
            lambda: self._evaluate(engine, dataloader_idx, batch), module.reduce
        )
        engine.release()
        return evaluated

    def evaluate(self, weights: ModelWeights, temperature: float | None = None) -> float:
        """Accuracy of any model at hand on the first set that a validation takes.

        All ranks must call it.

        Args:
            weights: of the model.
            temperature: instead of the set's.
        """
        engine = TransformersEngine()
        self.live.sync(engine, weights)
        correct = torch.zeros(2, dtype=torch.float64)
        for batch in range(limited(len(self.val_dataloader()[0]), self.trainer.limit_val_batches)):
            table = self._evaluate(engine, 0, batch, temperature).correct.double()
            correct += torch.stack([table.mean(1).sum(), torch.tensor(float(len(table)))])
        solved, prompts = self.live.module.reduce(correct, "sum").tolist()
        return float(solved / prompts) if prompts else float("nan")

    def cannot_evaluate(self, weights: ModelWeights) -> str:
        """Return why ``evaluate`` cannot sample from a model; empty if it can."""
        limits = TransformersEngine().refused_lengths
        return self.evaluation.refused(lambda most: limits(weights.path, most))

    def probe(self) -> RolloutBatch:
        """Sample a few tokens from the weights that the engine holds now; see ``RolloutSource``."""
        return self.rollouts.probe()

    def state_dict(self) -> dict[str, Any]:
        """Return the totals and, between two updates of a rollout, the rollout; collective."""
        return self.rollouts.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back; an evaluation needs none of it."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.rollouts.load_state_dict(state_dict)

    def _evaluate(
        self, engine: RolloutEngine, which: int, batch: int, temperature: float | None = None
    ) -> EvaluationBatch:
        """Sample this rank's rows of one batch of a set; there may be none left."""
        return self.evaluation.batch(
            which,
            batch,
            self.live.ranks,
            partial(self.live.sample, engine, training=False),
            self.rewards.reward,
            temperature,
        )

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
        )

    def _encode_evaluated(self, source: Prompts, name: str, max_tokens: int) -> PromptSet:
        return self._encode(source, name, self._rules(max_tokens), EVALUATED_ROWS)

    def _encode(self, source: Prompts, name: str, rules: PromptRules, most: int) -> PromptSet:
        prompts = PromptSet(source, name, self.live.module.tokenizer, rules, most, self.seed)
        if prompts.overlong and self.trainer.is_global_zero:
            print(prompts.left_out(), flush=True)
        return prompts
