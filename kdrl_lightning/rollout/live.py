"""Sampling in a run: engines are brought to the weights at hand, and completions are judged."""

from __future__ import annotations

import time
from typing import Any

from kdrl_lightning.distributed import stop_together
from kdrl_lightning.engines.base import RolloutEngine, Sampling
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rewards.processes.runner import RewardRunner
from kdrl_lightning.rollout.agreement import bound_of, probe, require_agreement
from kdrl_lightning.rollout.ahead import Ahead
from kdrl_lightning.rollout.generation import EncodedPrompt, Judged, sample_and_judge
from kdrl_lightning.rollout_batch import STUDENT


class LiveSampler:
    """What rollouts and evaluations share.

    Args:
        rewards: judges the completions.

    Attributes:
        trainer: of the run; set before anything is sampled.
        vocabulary_rows: of the smallest embedding that reads the completions; set likewise.
        ahead: completions that have been sampled already.
        max_mean_diff: ``WeightSyncCheck``'s bound, in nats; None: that of the precision.
    """

    def __init__(self, rewards: RewardRunner) -> None:
        self.rewards = rewards
        self.ahead = Ahead()
        self.trainer: Any = None
        self.vocabulary_rows: float = float("inf")
        self.max_mean_diff: float | None = None

    @property
    def module(self) -> Any:
        """The module that is trained or evaluated."""
        return self.trainer.lightning_module

    @property
    def ranks(self) -> tuple[int, int]:
        """This process, and how many there are."""
        return self.trainer.global_rank, self.trainer.world_size

    @property
    def pad_id(self) -> int:
        """Token after the end of a row: one that student and teacher have an embedding for."""
        tokenizer = self.module.tokenizer
        pad = tokenizer.pad_token_id
        known = pad is not None and pad < self.vocabulary_rows
        return int(pad if known else tokenizer.eos_token_id)

    def sync(self, engine: RolloutEngine, weights: ModelWeights) -> float:
        """Bring an engine to the current weights before it samples; return the seconds."""
        started = time.perf_counter()
        first = engine.version is None
        if first:
            # A teacher stops at its own end tokens.
            ends = weights.end_token_ids or self.module.end_tokens.ids
            engine.setup(weights, ends, self.pad_id)
        if engine.version != self.trainer.global_step:
            engine.update_weights(weights, self.trainer.global_step)
        if first and engine.compared and weights.model is self.module.weights().model:
            self._compare(engine, type(weights.model).__name__)
        return time.perf_counter() - started

    def _compare(self, engine: RolloutEngine, architecture: str) -> None:
        """Compare an engine with the student before it samples for the run; on all ranks."""
        module, precision = self.module, str(self.trainer.precision)
        rows = int(min(self.vocabulary_rows, module.vocabulary_rows))
        context = min(engine.context or module.context_length, module.context_length)
        batch = stop_together(lambda: probe(engine, module.tokenizer, rows, context), module.reduce)
        scored = module.score(batch.to(module.device))
        bound = self.max_mean_diff
        if bound is None:
            bound = bound_of(precision, engine.dtype)
        stop_together(lambda: require_agreement(engine, architecture, scored, bound), module.reduce)

    def sample(
        self,
        engine: RolloutEngine,
        prompts: list[EncodedPrompt],
        seeds: list[list[int]],
        sampling: Sampling,
        source: int = STUDENT,
        training: bool = True,
    ) -> list[Judged]:
        """Sample one completion per seed for each prompt and judge them, under the precision."""
        source_engine, tokenizer = self.ahead.over(engine), self.module.tokenizer
        with self.trainer.precision_plugin.forward_context():
            return sample_and_judge(
                source_engine,
                tokenizer,
                self.rewards,
                prompts,
                seeds,
                sampling,
                training,
                source,
                self.module.end_tokens,
            )
