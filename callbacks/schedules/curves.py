"""Schedules of a coefficient: pure functions of the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import ConfigurationError, require_between, require_count


class Schedule(ABC):
    """Base class of schedules: a coefficient as a function of the step.

    The callback's ``unit`` says whether a step is a rollout or an optimizer step.
    """

    @abstractmethod
    def coef_at(self, step: int) -> float:
        """Return the coefficient at a step, counted from 0."""

    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """Return a lower and an upper bound of the coefficient."""


class Constant(Schedule):
    """A constant coefficient.

    Args:
        value: the coefficient.
    """

    def __init__(self, value: float) -> None:
        self.value = _nonnegative("value", value)

    def coef_at(self, step: int) -> float:
        """Return the constant."""
        return self.value

    def extremes(self) -> tuple[float, float]:
        """Return the constant as both bounds."""
        return self.value, self.value


class LinearWithFloor(Schedule):
    """KDRL-Annealing's schedule ``max(start - decrement * step, floor)`` (arXiv 2506.02208).

    Args:
        start: coefficient at step 0.
        floor: smallest coefficient, from 0 to ``start``.
        decrement: decrease per step, above 0.

    >>> LinearWithFloor().coef_at(0), LinearWithFloor().coef_at(80), LinearWithFloor().coef_at(200)
    (0.005, 0.001, 0.001)
    """

    def __init__(self, start: float = 5e-3, floor: float = 1e-3, decrement: float = 5e-5) -> None:
        require_between("floor", floor, 0.0, start, "The coefficient falls from start to floor.")
        if not 0.0 < decrement < float("inf"):
            raise ConfigurationError(
                f"`decrement` must be above 0 and finite: got {decrement}. For a constant, use "
                "Constant."
            )
        self.start = _nonnegative("start", start)
        self.floor = floor
        self.decrement = decrement

    def coef_at(self, step: int) -> float:
        """Return the coefficient: it falls linearly, then stays at the floor."""
        return max(self.start - self.decrement * step, self.floor)

    def extremes(self) -> tuple[float, float]:
        """Return the floor and the start."""
        return self.floor, self.start


class _Span(Schedule):
    """Changes from ``start`` to ``end`` between two steps, and is constant before and after.

    Args:
        start: coefficient up to ``begin_step``.
        end: coefficient from ``end_step`` on.
        end_step: last step of the change, after ``begin_step``.
        begin_step: first step of the change, at least 0.
    """

    def __init__(self, start: float, end: float, end_step: int, begin_step: int = 0) -> None:
        require_count("begin_step", begin_step, 0, float("inf"))
        if end_step <= begin_step:
            raise ConfigurationError(
                f"`end_step` must come after begin_step {begin_step}: got {end_step}. "
                "For a jump, use Switch."
            )
        self.start = _nonnegative("start", start)
        self.end = _nonnegative("end", end)
        self.end_step = end_step
        self.begin_step = begin_step

    def coef_at(self, step: int) -> float:
        """Return the coefficient at a step."""
        passed = (step - self.begin_step) / (self.end_step - self.begin_step)
        share = self.shape(min(max(passed, 0.0), 1.0))
        return self.start * (1.0 - share) + self.end * share

    @abstractmethod
    def shape(self, passed: float) -> float:
        """Map the elapsed share of the span to the share of the change, 0 to 0 and 1 to 1."""

    def extremes(self) -> tuple[float, float]:
        """Return the smaller and the larger end."""
        return min(self.start, self.end), max(self.start, self.end)


class Linear(_Span):
    """A straight line from ``start`` to ``end``.

    Args:
        start: coefficient up to ``begin_step``.
        end: coefficient from ``end_step`` on.
        end_step: last step of the change, after ``begin_step``.
        begin_step: first step of the change, at least 0.

    >>> [Linear(1.0, 0.0, end_step=4).coef_at(step) for step in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """

    def shape(self, passed: float) -> float:
        """Return the elapsed share unchanged."""
        return passed


class Cosine(_Span):
    """Half a cosine from ``start`` to ``end``, with slope 0 at both ends.

    Args:
        start: coefficient up to ``begin_step``.
        end: coefficient from ``end_step`` on.
        end_step: last step of the change, after ``begin_step``.
        begin_step: first step of the change, at least 0.

    >>> [round(Cosine(1.0, 0.0, end_step=4).coef_at(step), 3) for step in (0, 1, 2, 4)]
    [1.0, 0.854, 0.5, 0.0]
    """

    def shape(self, passed: float) -> float:
        """Return half a cosine; it is exactly 1 at the end."""
        return (1.0 - math.cos(math.pi * passed)) / 2.0


class Switch(Schedule):
    """A hard switch: ``before`` while the step is below ``at_step``, then ``after``.

    OPD-then-RL (arXiv 2609.04108) switches the coefficient of the teacher's gap d from 1 to 0, and
    that of the advantage A from 0 to 1.

    Args:
        before: coefficient until the switch.
        after: coefficient from the switch on.
        at_step: first step with the new value, at least 1.

    >>> [Switch(1.0, 0.0, at_step=2).coef_at(step) for step in (0, 1, 2)]
    [1.0, 1.0, 0.0]
    """

    def __init__(self, before: float, after: float, at_step: int) -> None:
        require_count("at_step", at_step, 1, float("inf"), "For one value, use Constant.")
        self.before = _nonnegative("before", before)
        self.after = _nonnegative("after", after)
        self.at_step = at_step

    def coef_at(self, step: int) -> float:
        """Return the value before or after the switch."""
        return self.before if step < self.at_step else self.after

    def extremes(self) -> tuple[float, float]:
        """Return the smaller and the larger value."""
        return min(self.before, self.after), max(self.before, self.after)


class PlateauSwitch(Schedule):
    """A switch from ``before`` to ``after`` when a validation metric stops improving.

    This is the only schedule with state: the best value, the number of validations without a better
    one, and the step of the switch. The callback saves them in the checkpoint.

    Args:
        before: coefficient until the switch.
        after: coefficient from the switch on.
        patience: number of validations without improvement until the switch, at least 1.
        min_delta: smallest improvement that counts, at least 0.
        monitor: name of the metric; larger must be better.
    """

    def __init__(
        self,
        before: float,
        after: float,
        patience: int = 3,
        min_delta: float = 0.01,
        monitor: str = "val/accuracy",
    ) -> None:
        require_count("patience", patience, 1, float("inf"))
        require_between("min_delta", min_delta, 0.0, float("inf"))
        self.before = _nonnegative("before", before)
        self.after = _nonnegative("after", after)
        self.patience = patience
        self.min_delta = min_delta
        self.monitor = monitor
        self.switched_at: int | None = None
        self.reset()

    def reset(self) -> None:
        """Clear the state of an earlier run."""
        self.best = -math.inf
        self.waited = 0
        self.switched_at = None

    def observe(self, value: float, step: int) -> None:
        """Record a validation's value; after ``patience`` without gain, switch from ``step`` on."""
        if self.switched_at is not None:
            return
        if value > self.best + self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.switched_at = step

    def coef_at(self, step: int) -> float:
        """Return ``before`` for steps before the switch, ``after`` from the switch on."""
        switched = self.switched_at is not None and step >= self.switched_at
        return self.after if switched else self.before

    def extremes(self) -> tuple[float, float]:
        """Return the smaller and the larger value."""
        return min(self.before, self.after), max(self.before, self.after)

    def state_dict(self) -> State:
        """Return the state for a checkpoint."""
        return {"best": self.best, "waited": self.waited, "switched_at": self.switched_at}

    def load_state_dict(self, state: State) -> None:
        """Restore the state of a checkpoint."""
        self.best, self.waited = state["best"], state["waited"]
        self.switched_at = state["switched_at"]


def _nonnegative(name: str, value: float) -> float:
    """Return the value if it is at least 0 and finite.

    Raises:
        ConfigurationError: it is not.
    """
    require_between(name, value, 0.0, float("inf"))
    return value
