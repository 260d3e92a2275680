"""Any Python function as a reward, for one sample or a batch, with a time limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdrl_lightning.rewards.base import BatchReward, Sample, Verdict, attempt
from kdrl_lightning.rewards.callables import require_callable
from kdrl_lightning.rewards.processes.workers import WorkerPool

# `Any`: users' functions take a sample or a list, and return a number or a verdict.


class RewardFunction(BatchReward):
    """Uses a Python function, given by its import path, as a reward.

    The function may also be a partial, a bound method or an object with ``__call__``, but not a
    class, a lambda or an asynchronous function. It runs in worker processes. If a call exceeds the
    time limit, its process is killed with all processes that it has started. So the function's
    module must import what the function needs, and the function must not keep state between calls.
    If it needs the state or the GPU of the training process, set ``time_limit_s: null``: it then
    runs in the training process, and a call that hangs cannot be stopped. A plain function given
    directly as the reward also runs in the training process.

    Args:
        function: takes one ``Sample`` and returns a number or a ``Verdict``; with ``batch``, takes
            a list of samples and returns a list of the same length.
        batch: call the function once with all samples.
        time_limit_s: limit of one call in seconds; None runs it in the training process.
        workers: number of worker processes; a batch uses one.

    Raises:
        ConfigurationError: the function cannot be called with one argument, or another process
            cannot load it.
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
        """Judge several samples; with ``batch``, an error fails all of them."""
        if not self.batch:
            return self._map(list(samples))
        (results,) = self._map([list(samples)])
        if isinstance(results, Exception):
            raise results
        if isinstance(results, str | bytes | Mapping) or not hasattr(results, "__iter__"):
            raise TypeError(
                f"`function` must return a list for a batch: got {type(results).__name__}. "
                "Return one number or Verdict per sample."
            )
        return list(results)

    def close(self) -> None:
        """Stop the worker processes."""
        if self.pool is not None:
            self.pool.close()

    def _map(self, arguments: list[Any]) -> list[Any]:
        if self.pool is not None:
            return self.pool.map(arguments)
        return [attempt(self.function, argument) for argument in arguments]
