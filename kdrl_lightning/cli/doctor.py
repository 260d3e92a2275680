"""Runs ``python -m kdrl_lightning doctor``: checks that training works on this machine."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kdrl_lightning.cli.plain_parser import PlainParser
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.hardware.doctor.running import CHECKS, Outcome, chosen, run
from kdrl_lightning.hardware.machine import describe

MARKS = {True: "ok", False: "FAILED", None: ""}
WIDTH = 58


def doctor(args: Sequence[str]) -> int:
    """Run the checks and print a table.

    Args:
        args: the command line after ``doctor``.

    Returns:
        0 if no check failed, else 1. A check that this machine cannot run does not fail.

    Raises:
        ConfigurationError: a check is unknown, the JSON file has no folder, or the limit is not
            above 0.
    """
    settings = parser().parse_args(list(args))
    unknown = sorted(set(settings.only or ()) - {check.name for check in CHECKS})
    if unknown:
        known = ", ".join(check.name for check in CHECKS)
        raise ConfigurationError(
            f"`--only` must name checks: got {', '.join(unknown)}. Choose from {known}."
        )
    if settings.json is not None and not settings.json.parent.is_dir():
        raise ConfigurationError(
            f"`--json` must name a file in a folder that exists: got {settings.json}. Make the "
            "folder first."
        )
    if settings.limit is not None and not settings.limit > 0:
        raise ConfigurationError(f"`--limit` must be above 0: got {settings.limit}. Give seconds.")
    machine = describe()
    for name, value in machine.items():
        print(f"{name:<12} {value}")
    outcomes = []
    folder = Path(tempfile.mkdtemp(prefix="kdrl-doctor-"))
    for check in chosen(settings.only):
        print(f"\n{check.name}: {check.title}", flush=True)
        outcomes.append(run(check, folder, settings.limit))
        print("\n".join(lines(outcomes[-1])), flush=True)
    print("\n" + verdict(outcomes))
    if settings.json is not None:
        report = {"machine": machine, "checks": [outcome.as_json() for outcome in outcomes]}
        settings.json.write_text(json.dumps(report, indent=2) + "\n")
    failed = any(outcome.verdict == "failed" for outcome in outcomes)
    if not failed:  # else the user reads the logs of failed checks there
        shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


def parser() -> PlainParser:
    """Return the parser of the subcommand."""
    words = "Check that training works on this machine: small real runs, each in its own process."
    made = PlainParser("python -m kdrl_lightning doctor", description=words, allow_abbrev=False)
    names = ", ".join(check.name for check in CHECKS)
    made.add_argument("--only", nargs="+", metavar="CHECK", help=f"run these checks only: {names}")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all findings to a file")
    made.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="time limit of each check; each has its own default",
    )
    return made


def lines(outcome: Outcome) -> list[str]:
    """Return the rows of a check's table."""
    out = []
    for finding in outcome.findings:
        bound = f"({finding.bound})" if finding.bound else ""
        out.append(f"  {finding.what:<{WIDTH}} {finding.value} {bound} {MARKS[finding.passed]}")
    reason = f": {outcome.reason}" if outcome.reason else ""
    return [*map(str.rstrip, out), f"  -> {outcome.verdict}, {outcome.seconds:.0f} s{reason}"]


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Return the last table: a line per check."""
    out = ["verdict"]
    for outcome in outcomes:
        reason = f"   {outcome.reason}" if outcome.verdict == "not reached" else ""
        out.append(f"  {outcome.check.name:<12} {outcome.verdict}{reason}")
    return "\n".join(out)
