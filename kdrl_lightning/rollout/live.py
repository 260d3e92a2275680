"""Sync engines to the current weights, then sample completions and let the rewards judge them.

Threads can sample the next rollout in advance, while the current one trains.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from threading import Thread

import torch

from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.engines.agreement import (
    AS_THEY_ARE,
    MOVED,
    bound_of,
    equal_weights,
    moved,
    probe,
    require_agreement,
)
from kdrl_lightning.engines.base import Completion, RolloutEngine, Sampling
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rewards.processes.runner import RewardRunner
from kdrl_lightning.rollout.generation import EncodedPrompt, Judged, sample_and_judge
from kdrl_lightning.rollout.policy import Policy, Run
from kdrl_lightning.rollout_batch import STUDENT

Groups = list[list[Completion]]
# Compute types of the mixed precisions, whose weights are kept in a wider type.
COMPUTING = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Request:
    """A request to one engine: P prompts, and P lists of seeds, one per completion."""

    engine: RolloutEngine
    prompts: list[list[int]]
    seeds: list[list[int]]
    sampling: Sampling


class Ahead:
    """Samples the next rollout in advance, from the weights that the engines hold now.

    One thread per engine waits for its completions; it runs no collective and no reward, and does
    not touch torch's random state. ``wait`` and ``over(...).generate`` raise a thread's errors.

    Attributes:
        rollout: index of the rollout sampled in advance; None without one.
    """

    def __init__(self) -> None:
        self.rollout: int | None = None
        self._jobs: list[tuple[Request, Future[Groups]]] = []

    def start(self, rollout: int, version: int, requests: Sequence[Request]) -> None:
        """Begin to sample a rollout.

        Args:
            rollout: index of the next rollout.
            version: version of the student's weights, which every completion gets.
            requests: requests to engines that can sample during training.
        """
        self.drop()
        self.rollout = rollout
        for request in requests:
            future: Future[Groups] = Future()
            self._jobs.append((request, future))
            Thread(target=_sample, args=(request, version, future), daemon=True).start()

    def wait(self) -> None:
        """Wait until all completions are sampled; they stay available to ``over``."""
        for _, future in self._jobs:
            future.result()

    def drop(self) -> None:
        """Wait until all completions are sampled, and discard them."""
        wait([future for _, future in self._jobs])
        self.rollout, self._jobs = None, []

    def over(self, engine: RolloutEngine) -> Taker:
        """Return an engine that returns completions sampled in advance, and samples all others."""
        return Taker(engine, self._jobs)


@dataclass(frozen=True)
class Taker:
    """An engine that returns completions sampled in advance, if there are any for the request."""

    engine: RolloutEngine
    jobs: list[tuple[Request, Future[Groups]]]

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> Groups:
        """Return completions sampled in advance with these seeds and settings; else sample now."""
        wanted = (self.engine, list(seeds), sampling)
        for request, future in self.jobs:
            if (request.engine, request.seeds, request.sampling) == wanted:
                return future.result()
        return self.engine.generate(prompts, seeds, sampling)


def _sample(request: Request, version: int, future: Future[Groups]) -> None:
    try:
        groups = request.engine.generate(request.prompts, request.seeds, request.sampling)
        future.set_result([[replace(c, version=version) for c in group] for group in groups])
    except Exception as error:
        future.set_exception(error)


class LiveSampler:
    """Syncs engines, then samples and judges, for rollouts and evaluations.

    Args:
        rewards: judges the completions.

    Attributes:
        trainer: trainer of the run; set by ``join``.
        module: the module that is trained or evaluated; set by ``join``.
        vocabulary_rows: rows of the smallest embedding that reads the completions.
        ahead: completions sampled in advance.
        max_mean_diff: ``WeightSyncCheck``'s bound, in nats; None: the bound of the precision.
    """

    trainer: Run
    module: Policy

    def __init__(self, rewards: RewardRunner) -> None:
        self.rewards = rewards
        self.ahead = Ahead()
        self.vocabulary_rows: float = float("inf")
        self.max_mean_diff: float | None = None

    def join(self, trainer: Run, module: Policy) -> None:
        """Set the run to sample for; call it before anything is sampled."""
        self.trainer, self.module = trainer, module
        self.vocabulary_rows = module.vocabulary_rows

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank of this process, and number of processes."""
        return self.trainer.global_rank, self.trainer.world_size

    @property
    def pad_id(self) -> int:
        """Padding token, for which both student and teacher have an embedding."""
        tokenizer = self.module.tokenizer
        pad = tokenizer.pad_token_id
        return pad if pad is not None and pad < self.vocabulary_rows else tokenizer.eos_token_id

    def sync(self, engine: RolloutEngine, weights: ModelWeights) -> float:
        """Sync an engine to the current weights before it samples; return the seconds it took.

        Raises:
            ConfigurationError: the engine's first log-probabilities disagree with the student's.
        """
        started = time.perf_counter()
        computing = COMPUTING.get(str(self.trainer.precision))
        weights = replace(weights, compute_dtype=computing)
        first = engine.version is None
        compares = first and engine.compared and weights.model is self.module.weights().model
        # Lightning evaluates in inference mode by default. Weights that an engine allocates there
        # could not be updated outside of it.
        with torch.inference_mode(False):
            if first:
                # A teacher's completions stop at the teacher's end tokens.
                ends = weights.end_token_ids or self.module.end_tokens.ids
                # A teacher with another tokenizer need not have a row for the student's padding.
                rows = weights.model.get_input_embeddings().weight.shape[0]
                engine.setup(weights, ends, self.pad_id if self.pad_id < rows else ends[0])
            if compares and self.trainer.optimizers:
                self._compare_moved(engine, weights)
            if engine.version != self.trainer.global_step:
                engine.update_weights(weights, self.trainer.global_step)
        if compares:
            self._compare(engine, weights, AS_THEY_ARE)
        return time.perf_counter() - started

    def _compare_moved(self, engine: RolloutEngine, weights: ModelWeights) -> None:
        """Compare with noise added to tensors whose values are all equal; all ranks must call it.

        Values that are all 0 or all 1 can hide a difference until training changes them.
        """
        parts = equal_weights(weights.model)
        if not float(self.module.reduce(torch.tensor([float(len(parts))]), "sum")):
            return
        with moved(parts):
            engine.update_weights(weights, self.trainer.global_step)
            self._compare(engine, weights, MOVED)
        engine.release()
        engine.version = None  # it has the noisy weights

    def _compare(self, engine: RolloutEngine, weights: ModelWeights, which: str) -> None:
        """Compare an engine's log-probabilities with the student's; all ranks must call it."""
        architecture = type(weights.model).__name__
        module, precision = self.module, str(self.trainer.precision)
        rows = int(min(self.vocabulary_rows, module.vocabulary_rows))
        context = min(engine.context or module.context_length, module.context_length)
        batch = stop_together(lambda: probe(engine, module.tokenizer, rows, context), module.reduce)
        scored = module.score(batch.to(module.device))
        bound = self.max_mean_diff
        if bound is None:
            bound = bound_of(precision, engine.dtype)
        stop_together(
            lambda: require_agreement(engine, architecture, scored, bound, which), module.reduce
        )

    def sample(
        self,
        engine: RolloutEngine,
        prompts: list[EncodedPrompt],
        seeds: list[list[int]],
        sampling: Sampling,
        source: int = STUDENT,
        training: bool = True,
    ) -> list[Judged]:
        """Return one judged completion per seed for each prompt, in the run's precision."""
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
                None if source == STUDENT else self.module.frozen.in_student_tokens,
            )
