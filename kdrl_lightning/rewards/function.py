"""Any Python function as a reward, of one sample or of many, with a time limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdrl_lightning.rewards.base import BatchReward, Sample, Verdict
from kdrl_lightning.rewards.callables import require_callable
from kdrl_lightning.rewards.processes.workers import WorkerPool


class RewardFunction(BatchReward):
    """A function, by its import path, as a reward.

    A function, a partial, a bound method or an object with ``__call__``; not a class, a lambda or
    an asynchronous function. It runs in other processes, where it can be ended, and with it what it
    has started: import what it needs in its own module, and keep no state. One that needs this
    process's state or GPU takes ``time_limit_s: null``: it then runs here, and one that hangs
    cannot be ended. A plain function given as the reward itself runs here, too.

    Args:
        function: of one ``Sample``, returning a number or a ``Verdict``; with ``batch``, of a list
            of samples, returning as many.
        batch: it takes all samples of a call together.
        time_limit_s: of one call; None runs it in this process.
        workers: processes; a batch goes to one.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        batch: bool = False,
        time_limit_s: float | None = 10.0,
        workers: int = 4,
    ) -> None:
        require_callable("function", function)
        self.function = function
        self.batch = batch
        self.pool = (
            None
            if time_limit_s is None
            else WorkerPool(function, time_limit_s, 1 if batch else workers)
        )

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge many; if a batch fails, all of it does."""
        if not self.batch:
            return self._map(list(samples))
        (results,) = self._map([list(samples)])
        if isinstance(results, Exception):
            raise results
        if isinstance(results, str | bytes | Mapping) or not hasattr(results, "__iter__"):
            raise TypeError(f"a batch's results must be a list: got {type(results).__name__}")
        return list(results)

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.close()

    def _map(self, arguments: list[Any]) -> list[Any]:
        if self.pool is not None:
            return self.pool.map(arguments)
        results = []
        for argument in arguments:
            try:
                results.append(self.function(argument))
            except Exception as error:
                results.append(error)
        return results
