"""Schedules of a coefficient: pure functions of the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from kdrl_lightning.errors import ConfigurationError, require_between


class Schedule(ABC):
    """A coefficient over steps."""

    @abstractmethod
    def coef_at(self, step: int) -> float:
        """Coefficient at a step, from 0 on."""

    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """Return two values between which the coefficient stays."""


class Constant(Schedule):
    """One value.

    Args:
        value: the coefficient.
    """

    def __init__(self, value: float) -> None:
        self.value = _positive("value", value)

    def coef_at(self, step: int) -> float:
        """Return the value."""
        return self.value

    def extremes(self) -> tuple[float, float]:
        """Return the value twice."""
        return self.value, self.value


class LinearWithFloor(Schedule):
    """``max(start - decrement * step, floor)``: KDRL-Annealing (arXiv 2506.02208).

    Args:
        start: coefficient at step 0.
        floor: smallest coefficient, at most ``start``.
        decrement: fall per step, above 0.

    >>> LinearWithFloor().coef_at(0), LinearWithFloor().coef_at(80), LinearWithFloor().coef_at(200)
    (0.005, 0.001, 0.001)
    """

    def __init__(self, start: float = 5e-3, floor: float = 1e-3, decrement: float = 5e-5) -> None:
        require_between("floor", floor, 0.0, start, "The coefficient falls from start to floor.")
        if not 0.0 < decrement < float("inf"):
            raise ConfigurationError(f"`decrement` must be above 0 and finite: got {decrement}.")
        self.start = _positive("start", start)
        self.floor = floor
        self.decrement = decrement

    def coef_at(self, step: int) -> float:
        """Fall, then stay."""
        return max(self.start - self.decrement * step, self.floor)

    def extremes(self) -> tuple[float, float]:
        """Return floor and start."""
        return self.floor, self.start


class _Span(Schedule):
    """From ``start`` to ``end`` between two steps; constant before and after.

    Args:
        start: coefficient up to ``begin_step``.
        end: coefficient from ``end_step`` on.
        end_step: last step of the change, after ``begin_step``.
        begin_step: first step of the change, at least 0.
    """

    def __init__(self, start: float, end: float, end_step: int, begin_step: int = 0) -> None:
        require_between("begin_step", begin_step, 0, float("inf"))
        if end_step <= begin_step:
            raise ConfigurationError(
                f"`end_step` must come after begin_step {begin_step}: got {end_step}. "
                "For a jump use Switch."
            )
        self.start = _positive("start", start)
        self.end = _positive("end", end)
        self.end_step = end_step
        self.begin_step = begin_step

    def coef_at(self, step: int) -> float:
        """Coefficient at a step."""
        passed = (step - self.begin_step) / (self.end_step - self.begin_step)
        share = self.shape(min(max(passed, 0.0), 1.0))
        return self.start * (1.0 - share) + self.end * share

    @abstractmethod
    def shape(self, passed: float) -> float:
        """Map the passed share of the span to the share of the change; 0 to 0 and 1 to 1."""

    def extremes(self) -> tuple[float, float]:
        """Return both ends."""
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
        """Return it as it is."""
        return passed


class Cosine(_Span):
    """Half a cosine from ``start`` to ``end``: flat at both.

    Args:
        start: coefficient up to ``begin_step``.
        end: coefficient from ``end_step`` on.
        end_step: last step of the change, after ``begin_step``.
        begin_step: first step of the change, at least 0.

    >>> [round(Cosine(1.0, 0.0, end_step=4).coef_at(step), 3) for step in (0, 1, 2, 4)]
    [1.0, 0.854, 0.5, 0.0]
    """

    def shape(self, passed: float) -> float:
        """Return half a cosine, exactly 1 at the end."""
        return (1.0 - math.cos(math.pi * passed)) / 2.0


class Switch(Schedule):
    """``before`` while step < ``at_step``, then ``after``: a hard switch.

    With d's coefficient 1 to 0 and A's 0 to 1 it is OPD-then-RL (arXiv 2609.04108).

    Args:
        before: coefficient until the switch.
        after: coefficient from then on.
        at_step: first step with the new value, above 0.

    >>> [Switch(1.0, 0.0, at_step=2).coef_at(step) for step in (0, 1, 2)]
    [1.0, 1.0, 0.0]
    """

    def __init__(self, before: float, after: float, at_step: int) -> None:
        require_between("at_step", at_step, 1, float("inf"), "For one value use Constant.")
        self.before = _positive("before", before)
        self.after = _positive("after", after)
        self.at_step = at_step

    def coef_at(self, step: int) -> float:
        """Return the side of the switch."""
        return self.before if step < self.at_step else self.after

    def extremes(self) -> tuple[float, float]:
        """Return both values."""
        return min(self.before, self.after), max(self.before, self.after)


class PlateauSwitch(Schedule):
    """``before`` until validation stops improving, then ``after``.

    The only schedule with a memory: best value, validations without a better one, and the step of
    the switch; the callback saves them.

    Args:
        before: coefficient until the switch.
        after: coefficient from then on.
        patience: validations without improvement that make it switch, at least 1.
        min_delta: smallest improvement that counts, at least 0.
        monitor: the metric; larger is better.
    """

    def __init__(
        self,
        before: float,
        after: float,
        patience: int = 3,
        min_delta: float = 0.01,
        monitor: str = "val/accuracy",
    ) -> None:
        require_between("patience", patience, 1, float("inf"))
        require_between("min_delta", min_delta, 0.0, float("inf"))
        self.before = _positive("before", before)
        self.after = _positive("after", after)
        self.patience = patience
        self.min_delta = min_delta
        self.monitor = monitor
        self.switched_at: int | None = None
        self.reset()

    def reset(self) -> None:
        """Forget an earlier run."""
        self.best = -math.inf
        self.waited = 0
        self.switched_at = None

    def observe(self, value: float, step: int) -> None:
        """Take a validation's value, measured before ``step``."""
        if self.switched_at is not None:
            return
        if value > self.best + self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.switched_at = step

    def coef_at(self, step: int) -> float:
        """Return the side of the switch; the past stays as it was."""
        switched = self.switched_at is not None and step >= self.switched_at
        return self.after if switched else self.before

    def extremes(self) -> tuple[float, float]:
        """Return both values."""
        return min(self.before, self.after), max(self.before, self.after)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory."""
        return {"best": self.best, "waited": self.waited, "switched_at": self.switched_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the memory."""
        self.best, self.waited = state["best"], state["waited"]
        self.switched_at = state["switched_at"]


def _positive(name: str, value: float) -> float:
    """Return a value that is at least 0 and finite."""
    require_between(name, value, 0.0, float("inf"))
    return value
