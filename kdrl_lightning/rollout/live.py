"""Sampling in a run: sync engines to the current weights, then sample and judge."""

from __future__ import annotations

import time

from kdrl_lightning.engines.base import RolloutEngine, Sampling
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rewards.processes.runner import RewardRunner
from kdrl_lightning.rollout.ahead import Ahead
from kdrl_lightning.rollout.generation import EncodedPrompt, Judged, sample_and_judge
from kdrl_lightning.rollout.policy import Policy, Run
from kdrl_lightning.rollout_batch import STUDENT


class LiveSampler:
    """What rollouts and evaluations share.

    Args:
        rewards: judges the completions.

    Attributes:
        trainer: of the run; set by ``join``.
        module: the module that is trained or evaluated; set by ``join``.
        vocabulary_rows: of the smallest embedding that reads the completions.
        ahead: completions that have been sampled already.
    """

    trainer: Run
    module: Policy

    def __init__(self, rewards: RewardRunner) -> None:
        self.rewards = rewards
        self.ahead = Ahead()
        self.vocabulary_rows: float = float("inf")

    def join(self, trainer: Run, module: Policy) -> None:
        """Sample for this run from now on; before anything is sampled."""
        self.trainer, self.module = trainer, module
        self.vocabulary_rows = module.vocabulary_rows

    @property
    def ranks(self) -> tuple[int, int]:
        """This process, and how many there are."""
        return self.trainer.global_rank, self.trainer.world_size

    @property
    def pad_id(self) -> int:
        """Token after the end of a row: one that student and teacher have an embedding for."""
        tokenizer = self.module.tokenizer
        pad = tokenizer.pad_token_id
        return pad if pad is not None and pad < self.vocabulary_rows else tokenizer.eos_token_id

    def sync(self, engine: RolloutEngine, weights: ModelWeights) -> float:
        """Bring an engine to the current weights before it samples; return the seconds."""
        started = time.perf_counter()
        if engine.version is None:
            # A teacher stops at its own end tokens.
            ends = weights.end_token_ids or self.module.end_tokens.ids
            engine.setup(weights, ends, self.pad_id)
        if engine.version != self.trainer.global_step:
            engine.update_weights(weights, self.trainer.global_step)
        return time.perf_counter() - started

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
        with self.trainer.precision_plugin.forward_context():
            return sample_and_judge(
                self.ahead.over(engine),
                self.module.tokenizer,
                self.rewards,
                prompts,
                seeds,
                sampling,
                training,
                source,
                self.module.end_tokens,
            )
