"""What a check finds: a value, its bound, and whether the value keeps to it."""

from __future__ import annotations

from dataclasses import dataclass


class NotReachedError(Exception):
    """Raised if a check cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        what: what was measured.
        value: the measured value, with its unit.
        bound: the bound on the value; empty if there is none.
        passed: whether the value keeps to the bound; None if there is none.
    """

    what: str
    value: str
    bound: str = ""
    passed: bool | None = None


def info(what: str, value: object) -> Finding:
    """Return a finding without a bound."""
    return Finding(what, str(value))


def at_most(what: str, value: float, bound: float, unit: str = "") -> Finding:
    """Return a finding that passes if ``value`` is at most ``bound``; NaN fails.

    >>> at_most("difference", 2e-6, 1e-5, "nats")
    Finding(what='difference', value='2e-06 nats', bound='at most 1e-05', passed=True)
    """
    return Finding(what, _text(value, unit), f"at most {bound:.3g}", value <= bound)


def at_least(what: str, value: float, bound: float, unit: str = "") -> Finding:
    """Return a finding that passes if ``value`` is at least ``bound``; NaN fails."""
    return Finding(what, _text(value, unit), f"at least {bound:.3g}", value >= bound)


def equal(what: str, found: object, wanted: object) -> Finding:
    """Return a finding that passes if the two are equal."""
    return Finding(what, str(found), f"{wanted}", found == wanted)


def holds(what: str, passed: bool) -> Finding:
    """Return a finding that passes if a statement holds: "yes" or "no"."""
    return Finding(what, "yes" if passed else "no", "yes", passed)


def _text(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".rstrip()
