"""Sampling one rollout in advance, in threads, while the rollout before trains."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from threading import Thread

from kdrl_lightning.engines.base import Completion, RolloutEngine, Sampling

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
