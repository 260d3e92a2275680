"""The LightningDataModule: prompts to scored rollout batches, on the fly."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from kdrl_lightning.checks import check_rollout_settings
from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.evaluation import EvaluationBatch
from kdrl_lightning.metrics import peak_gb
from kdrl_lightning.prompts.base import EncodedPrompt, Prompts, encode_all
from kdrl_lightning.rewards.base import Reward, RewardRunner
from kdrl_lightning.rollout.collector import Collector, Source
from kdrl_lightning.rollout.engine import RolloutEngine, Sampling, noise_seed
from kdrl_lightning.rollout.groups import EVALUATION_NOISE, Slots
from kdrl_lightning.rollout.loader import IndexLoader, limited
from kdrl_lightning.rollout.plan import RolloutPlan, plan_updates
from kdrl_lightning.rollout.sampler import Judged, sample_and_judge
from kdrl_lightning.rollout.store import pack, unpack
from kdrl_lightning.rollout.together import require_finite, stop_together
from kdrl_lightning.rollout.transformers_engine import TransformersEngine
from kdrl_lightning.rollout.watch import RolloutWatch
from kdrl_lightning.rollout_batch import STUDENT, TEACHER, RolloutBatch
from kdrl_lightning.weights import ModelWeights

BatchChange: TypeAlias = Callable[[RolloutBatch], RolloutBatch]


class RolloutDataModule(pl.LightningDataModule):
    """Turns prompts into rollouts with the current weights, and cuts them into micro-batches.

    One rollout serves ``minibatches_per_rollout * epochs_per_rollout`` optimizer steps; each takes
    ``trainer.accumulate_grad_batches`` micro-batches. The rollout to use follows from
    ``trainer.global_step``, the noise of a completion from (seed, rollout, prompt, completion).

    Args:
        train_prompts: prompts to train on.
        reward: callable of one ``Sample``; returns a number or a ``Verdict``.
        val_prompts: prompts for validate, test and predict.
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
        rollouts_per_epoch: rollouts of one trainer epoch (validation follows it); None: as many as
            take each prompt once.
        mask_truncated: leave completions cut at ``max_tokens`` out of the loss.
        val_batch_size: prompts per evaluation batch and process.
        val_samples: completions per evaluation prompt.
        val_temperature: 0 is greedy.
        max_reward_failure_frac: stop when the reward fails on more than this part of a rollout.
        seed: order of prompts and noise of sampling.
    """

    trainer: Any  # attached by Lightning before any hook runs

    def __init__(
        self,
        train_prompts: Prompts,
        reward: Reward,
        val_prompts: Prompts | None = None,
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
        rollouts_per_epoch: int | None = None,
        mask_truncated: bool = False,
        val_batch_size: int = 256,
        val_samples: int = 1,
        val_temperature: float = 0.0,
        max_reward_failure_frac: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {
            "prompts_per_rollout": prompts_per_rollout,
            "max_tokens": max_tokens,
            "minibatches_per_rollout": minibatches_per_rollout,
            "epochs_per_rollout": epochs_per_rollout,
            "val_batch_size": val_batch_size,
            "val_samples": val_samples,
            "rollouts_per_epoch": 1 if rollouts_per_epoch is None else rollouts_per_epoch,
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
        if group_size + teacher_completions < 1:
            raise ConfigurationError(
                f"`group_size` must be at least 1 without `teacher_completions`: got {group_size}."
            )
        require_between("val_temperature", val_temperature, 0.0, float("inf"), "0 is greedy.")
        if teacher_temperature is not None and not teacher_completions:
            raise ConfigurationError(
                f"`teacher_temperature` must go with `teacher_completions`: got "
                f"{teacher_temperature} and no completions."
            )
        teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
        for name, heat in (
            ("temperature", temperature),
            ("teacher_temperature", teacher_temperature),
        ):
            if not 0.0 < heat < float("inf"):
                raise ConfigurationError(
                    f"`{name}` must be above 0 for rollouts: got {heat}. "
                    "Greedy sampling has no gradient; 1.0 is usual."
                )
        self.train_prompts = train_prompts
        self.val_prompts = val_prompts
        self.rollout_engine = rollout_engine or TransformersEngine()
        self.prompts_per_rollout = prompts_per_rollout
        self.group_size = group_size
        self.teacher_completions = teacher_completions
        self.teacher_engine = teacher_engine or TransformersEngine()
        self.train_sampling = Sampling(max_tokens, temperature)
        self.val_sampling = Sampling(max_tokens, val_temperature)
        self.collector = Collector(
            Slots(prompts_per_rollout, minibatches_per_rollout, max_refills, seed),
            Source(STUDENT, self.rollout_engine, group_size, self.train_sampling),
            Source(
                TEACHER,
                self.teacher_engine,
                teacher_completions,
                Sampling(max_tokens, teacher_temperature),
            ),
            mask_truncated,
        )
        self.minibatches_per_rollout = minibatches_per_rollout
        self.epochs_per_rollout = epochs_per_rollout
        self.rollouts_per_epoch = rollouts_per_epoch or max(
            len(train_prompts) // prompts_per_rollout, 1
        )
        self.val_batch_size = val_batch_size
        self.val_samples = val_samples
        self.seed = seed
        self.rewards = RewardRunner(reward, max_reward_failure_frac)
        self.watch = RolloutWatch()
        self._plan: RolloutPlan | None = None
        self._stored: dict[str, Any] | None = None
        self._teacher_seconds = 0.0
        self._train: list[EncodedPrompt] = []
        self._val: list[EncodedPrompt] = []

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
        return float(self.collector.teacher_seconds + self._module().teacher_seconds)

    def rollout_at(self, global_step: int) -> int:
        """Index of the rollout that the update after ``global_step`` updates uses."""
        return global_step // self.updates_per_rollout

    def setup(self, stage: str) -> None:
        """Encode the prompts and check what can be checked before training."""
        if self.val_prompts is None:
            if stage != "fit":
                raise ConfigurationError(
                    f"`val_prompts` must be given to {TrainerFn(stage).value}: got None. "
                    "Name a prompt source."
                )
            self.trainer.limit_val_batches = 0
        # Another module or trainer may have used this object: its rollout and weights are not ours.
        self._plan = self._stored = None
        self._teacher_seconds = self.teacher_seconds
        self.watch = RolloutWatch() if stage == "fit" else self.watch
        self.rollout_engine.version = self.teacher_engine.version = None
        if self.val_prompts is not None:
            self._val = self._encode(self.val_prompts, "val_prompts")
        if stage == "fit":
            check_rollout_settings(self.trainer, self, self._module())
            self._train = self._encode(self.train_prompts, "train_prompts")
            if self._module().teacher is not None:
                for row, _ in self._train:  # a row without a teacher is found before the run
                    self._module().teacher.route(row)
        for rows in (self._train, self._val):
            if rows:
                self.rewards.try_once(rows[0][0])

    def train_dataloader(self) -> IndexLoader:
        """Return indices of micro-batches within their optimizer step."""
        micro = self.trainer.accumulate_grad_batches
        return IndexLoader(self.rollouts_per_epoch * self.updates_per_rollout * micro, micro)

    def val_dataloader(self) -> IndexLoader | list[Any]:
        """Return indices of evaluation batches, as many on every rank."""
        if not self._val:
            return []
        per_batch = self.val_batch_size * self.trainer.world_size
        return IndexLoader(-(-len(self._val) // per_batch))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn an index into a batch, on every rank, with the current weights."""
        if not isinstance(batch, int):  # Lightning moves ints as they are
            raise TypeError(f"expected an index, got {type(batch).__name__}")
        if self.trainer.training:
            return self._training_batch(batch)
        self._sync(self.rollout_engine, self._module().weights())
        evaluated = self._evaluate(self.rollout_engine, batch)
        self.rollout_engine.release()
        return evaluated

    def evaluate(self, weights: ModelWeights) -> float:
        """Accuracy of any model at hand on the prompts that a validation takes.

        All ranks must call it.
        """
        engine = TransformersEngine()
        module = self._module()
        engine.setup(weights, module.tokenizer.eos_token_id, self._pad_id())
        engine.update_weights(weights, self.trainer.global_step)
        correct = torch.zeros(2, dtype=torch.float64)
        for batch in range(limited(len(self.val_dataloader()), self.trainer.limit_val_batches)):
            table = self._evaluate(engine, batch).correct.double()
            correct += torch.stack([table.mean(1).sum(), torch.tensor(float(len(table)))])
        solved, prompts = module.reduce(correct, "sum").tolist()
        return float(solved / prompts) if prompts else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Return the totals and, between two updates of a rollout, the rollout; collective."""
        rollout, update = divmod(self.trainer.global_step, self.updates_per_rollout)
        stored = self._stored
        if update and self._plan is not None:
            tensors = pack(self._plan.batch, self._slots(), self._pad_id())
            stored = {"rollout": rollout, "layout": self._layout(), "tensors": tensors}
        return {"watch": self.watch.state_dict(), "stored": stored if update else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back.

        Raises:
            ConfigurationError: the rollout is half used, and rollouts are laid out otherwise here.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.watch.load_state_dict(state_dict["watch"])
        self._stored = state_dict["stored"]
        for name, value in {} if self._stored is None else self._stored["layout"].items():
            if (here := self._layout()[name]) != value:
                raise ConfigurationError(
                    f"`{name}` must be {value} to go on in the middle of a rollout, as this "
                    f"checkpoint does: got {here}. Give {value}, or take a checkpoint at a "
                    "rollout's end."
                )

    def _training_batch(self, micro: int) -> RolloutBatch:
        rollout, update = divmod(self.trainer.global_step, self.updates_per_rollout)
        if self._plan is None or self._plan.rollout != rollout:
            self._plan = None  # free the old one before the new one is made
            self._plan = self._make_rollout(rollout) if not update else self._resumed(rollout)
        return self._plan.micro_batch(update, micro)

    def _resumed(self, rollout: int) -> RolloutPlan:
        """Return the half-used rollout of a checkpoint; without one it is made anew."""
        if self._stored is None or self._stored["rollout"] != rollout:
            return self._make_rollout(rollout)
        batch = unpack(self._stored["tensors"], self._slots())
        self._stored = None
        return self._planned(batch, rollout, lambda b: b, lambda b: b)

    def _planned(
        self,
        batch: RolloutBatch,
        rollout: int,
        score: BatchChange,
        prepare: BatchChange,
        score_first: BatchChange | None = None,
    ) -> RolloutPlan:
        module = self._module()
        return plan_updates(
            batch.to(module.device),
            rollout=rollout,
            minibatches=self.minibatches_per_rollout,
            epochs=self.epochs_per_rollout,
            micro_batches=self.trainer.accumulate_grad_batches,
            max_tokens=self.train_sampling.max_tokens,
            score=score,
            prepare=prepare,
            reduce=module.reduce,
            score_first=score_first,
        )

    def _make_rollout(self, rollout: int) -> RolloutPlan:
        started = time.perf_counter()
        module = self._module()
        sync_seconds = self._sync(self.rollout_engine, module.weights())
        if self.teacher_completions and self.teacher_engine.version is None:
            self._sync(self.teacher_engine, module.teacher.weights())
        batch, replaced = stop_together(lambda: self._collect(rollout), module.reduce)
        self.rollout_engine.release()
        sampled = time.perf_counter()
        prepare = module.objective.prepare
        # Its old scores are its own where nothing else reads them and nothing replays it.
        pending = self.epochs_per_rollout == 1 and not module.objective.reads_old_scores(batch)
        first = module.score_pending if pending else None
        plan = self._planned(batch, rollout, module.score, prepare, first)
        teacher, tokens = plan.batch.teacher_logprobs, int(plan.batch.completion_mask.sum())
        stop_together(lambda: require_finite(teacher, tokens), module.reduce)
        seconds = {
            "time/sync_s": sync_seconds,
            "time/rollout_s": sampled - started - sync_seconds,
            "time/score_s": time.perf_counter() - sampled,
            # Of the two above, and of the updates since the last rollout.
            "time/teacher_s": self.teacher_seconds - self._teacher_seconds,
        }
        self._teacher_seconds = self.teacher_seconds
        compares = module.objective.needs_groups
        metrics = self.watch.measure(
            plan.batch, self.rewards, seconds, module.reduce, compares, replaced
        )
        own = torch.tensor([plan.padding_frac, peak_gb(module.device)], dtype=torch.float64)
        padding, peak = module.reduce(own, "max").tolist()
        metrics |= {"rollout/padding_frac": padding, "memory/peak_gb": peak}
        return plan.with_metrics(metrics, self.trainer.global_step % self.updates_per_rollout)

    def _collect(self, rollout: int) -> tuple[RolloutBatch, list[list[Judged]]]:
        """Sample this rank's share of a rollout; return it and the groups that were replaced."""
        teacher = self._module().teacher
        batch, replaced = self.collector.collect(
            rollout,
            self._train,
            self.trainer.global_rank,
            self.trainer.world_size,
            self._sample,
            (lambda row: 0) if teacher is None else teacher.route,
            self._pad_id(),
        )
        if teacher is not None:
            teacher.accept(batch)
        return batch, replaced

    def _evaluate(self, engine: RolloutEngine, batch: int) -> EvaluationBatch:
        """Sample this rank's rows of one evaluation batch; there may be none left."""
        world = self.trainer.world_size
        start, end = (b * self.val_batch_size * world for b in (batch, batch + 1))
        rows = range(start + self.trainer.global_rank, min(len(self._val), end), world)
        seeds = [
            [noise_seed(self.seed, EVALUATION_NOISE, r, k) for k in range(self.val_samples)]
            for r in rows
        ]
        prompts = [self._val[r] for r in rows]
        judged = self._sample(engine, prompts, seeds, self.val_sampling, training=False)
        return EvaluationBatch.from_judged(judged, self.val_samples)

    def _sample(
        self,
        engine: RolloutEngine,
        prompts: list[EncodedPrompt],
        seeds: list[list[int]],
        sampling: Sampling,
        source: int = STUDENT,
        training: bool = True,
    ) -> list[Judged]:
        tokenizer = self._module().tokenizer
        with self.trainer.precision_plugin.forward_context():
            return sample_and_judge(
                engine, tokenizer, self.rewards, prompts, seeds, sampling, training, source
            )

    def _sync(self, engine: RolloutEngine, weights: ModelWeights) -> float:
        """Bring the engine to the current weights before it samples; return the seconds."""
        started = time.perf_counter()
        if engine.version is None:
            engine.setup(weights, self._module().tokenizer.eos_token_id, self._pad_id())
        if engine.version != self.trainer.global_step:
            engine.update_weights(weights, self.trainer.global_step)
        return time.perf_counter() - started

    def _encode(self, source: Prompts, name: str) -> list[EncodedPrompt]:
        module = self._module()
        limit = module.context_length - self.train_sampling.max_tokens
        prompts = encode_all(source, name, module.tokenizer)
        for i, (_, ids) in enumerate(prompts):
            if len(ids) > limit:
                raise ConfigurationError(
                    f"`{name}` must fit the context of {module.context_length} tokens with "
                    f"`max_tokens` {self.train_sampling.max_tokens}: got {len(ids)} tokens in row "
                    f"{i}. Drop or shorten the prompt, or lower `max_tokens`."
                )
        return prompts

    def _slots(self) -> list[int]:
        return self.collector.slots.of_rank(self.trainer.global_rank, self.trainer.world_size)

    def _layout(self) -> dict[str, int]:
        """What decides which completions a rollout has, and when they are used."""
        return {
            "seed": self.seed,
            "prompts_per_rollout": self.prompts_per_rollout,
            "group_size": self.group_size,
            "teacher_completions": self.teacher_completions,
            "minibatches_per_rollout": self.minibatches_per_rollout,
            "epochs_per_rollout": self.epochs_per_rollout,
        }

    def _pad_id(self) -> int:
        tokenizer = self._module().tokenizer
        pad = tokenizer.pad_token_id
        return int(tokenizer.eos_token_id if pad is None else pad)

    def _module(self) -> Any:
        return self.trainer.lightning_module
