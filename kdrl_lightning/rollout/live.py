"""Sampling in a run: sync engines to the current weights, then sample and judge.

A rollout can be sampled in advance, in threads, while the rollout before trains.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from threading import Thread

from kdrl_lightning.distributed import stop_together
from kdrl_lightning.engines.agreement import bound_of, probe, require_agreement
from kdrl_lightning.engines.base import Completion, RolloutEngine, Sampling
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rewards.processes.runner import RewardRunner
from kdrl_lightning.rollout.generation import EncodedPrompt, Judged, sample_and_judge
from kdrl_lightning.rollout.policy import Policy, Run
from kdrl_lightning.rollout_batch import STUDENT

Groups = list[list[Completion]]


@dataclass(frozen=True)
class Request:
    """What to sample from one engine: P prompts, and P lists of seeds."""

    engine: RolloutEngine
    prompts: list[list[int]]
    seeds: list[list[int]]
    sampling: Sampling


class Ahead:
    """The completions of the coming rollout, from the weights that the engines hold now.

    A thread per engine only asks it: no collective, no reward, and none of torch's randomness. What
    goes wrong in it is raised by ``wait`` and ``over(...).generate``.

    Attributes:
        rollout: the one that is sampled ahead; None where none is.
    """

    def __init__(self) -> None:
        self.rollout: int | None = None
        self._jobs: list[tuple[Request, Future[Groups]]] = []

    def start(self, rollout: int, version: int, requests: Sequence[Request]) -> None:
        """Begin to sample.

        Args:
            rollout: index of the coming rollout.
            version: of the student's weights, for every completion to carry.
            requests: to engines that can sample during training.
        """
        self.drop()
        self.rollout = rollout
        for request in requests:
            future: Future[Groups] = Future()
            self._jobs.append((request, future))
            Thread(target=_sample, args=(request, version, future), daemon=True).start()

    def wait(self) -> None:
        """Wait until all is sampled; it stays here until it is taken."""
        for _, future in self._jobs:
            future.result()

    def drop(self) -> None:
        """Wait, and forget what came out."""
        wait([future for _, future in self._jobs])
        self.rollout, self._jobs = None, []

    def over(self, engine: RolloutEngine) -> Taker:
        """Return what generates like ``engine``, from here where it is sampled already."""
        return Taker(engine, self._jobs)


@dataclass(frozen=True)
class Taker:
    """An engine with completions that it need not sample any more."""

    engine: RolloutEngine
    jobs: list[tuple[Request, Future[Groups]]]

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> Groups:
        """Sample; see ``RolloutEngine.generate``. Seeds tell what was asked for ahead."""
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
    """What rollouts and evaluations share.

    Args:
        rewards: judges the completions.

    Attributes:
        trainer: of the run; set by ``join``.
        module: the module that is trained or evaluated; set by ``join``.
        vocabulary_rows: of the smallest embedding that reads the completions.
        ahead: completions that have been sampled already.
        max_mean_diff: ``WeightSyncCheck``'s bound, in nats; None: that of the precision.
    """

    trainer: Run
    module: Policy

    def __init__(self, rewards: RewardRunner) -> None:
        self.rewards = rewards
        self.ahead = Ahead()
        self.vocabulary_rows: float = float("inf")
        self.max_mean_diff: float | None = None

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
