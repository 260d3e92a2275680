"""The list of checks, and how to run one in a process with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from kdrl_lightning.hardware.doctor.findings import Finding

Verdict: TypeAlias = Literal["passed", "failed", "not reached"]


@dataclass(frozen=True)
class Check:
    """A check of the machine, whose function ``run`` is in the module of the same name.

    Attributes:
        name: name of the module.
        title: what it checks, for the table.
        limit: seconds after which its process is killed.
    """

    name: str
    title: str
    limit: float


CHECKS = (
    Check("start", "a few training steps from the command line and in Python", 180),
    Check("head", "the language-model head against float64, and its speed", 120),
    Check("attention", "padded rows, shared prompts and sliding windows", 120),
    Check("engine", "vLLM in the training process: weights, seeds, sleep", 300),
    Check("throughput", "tokens per second of sampling and of updates", 300),
    Check("sharded", "fsdp2 on one device: checkpoint, resume, teacher, LoRA", 600),
    Check("teacher", "a teacher on the device, offloaded and served, and its top tokens", 400),
    Check("several", "two processes: ddp, fsdp2, an error on one rank, weights by NCCL", 900),
)


@dataclass(frozen=True)
class Outcome:
    """The result of a check.

    Attributes:
        check: the check.
        verdict: ``failed`` if a finding failed or the check ended early; ``not reached`` if this
            machine cannot run it.
        seconds: how long it ran.
        findings: its findings, in order.
        reason: why it failed or was not reached; empty if it passed.
    """

    check: Check
    verdict: Verdict
    seconds: float
    findings: tuple[Finding, ...]
    reason: str = ""

    def as_json(self) -> dict[str, object]:
        """Return the outcome as a dictionary for JSON."""
        return {
            "name": self.check.name,
            "title": self.check.title,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 1),
            "reason": self.reason,
            "findings": [asdict(f) for f in self.findings],
        }


def run(check: Check, folder: Path, limit: float | None = None) -> Outcome:
    """Run a check in a separate process, and kill that process after the time limit.

    Args:
        check: the check.
        folder: folder for files that checks share and for the check's output.
        limit: seconds; None: the check's ``limit``.
    """
    limit = check.limit if limit is None else limit
    found, log = folder / f"{check.name}.jsonl", folder / f"{check.name}.log"
    command = [sys.executable, "-m", "kdrl_lightning.hardware.doctor.child", check.name]
    began = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, str(folder)], stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    findings = tuple(Finding(**line) for line in lines if "what" in line)
    ended = next((line for line in lines if "ended" in line), None)
    if code is None:
        reason = f"it took longer than {limit:g} s, and was ended; its output is in {log}"
        return Outcome(check, "failed", seconds, findings, reason)
    if ended is None:
        reason = f"its process ended with code {code}; its output is in {log}"
        return Outcome(check, "failed", seconds, findings, reason)
    if ended["ended"] == "not reached":
        return Outcome(check, "not reached", seconds, findings, ended["reason"])
    missed = [f.what for f in findings if f.passed is False]
    reason = ended["reason"] or "; ".join(missed)
    return Outcome(check, "failed" if reason else "passed", seconds, findings, reason)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def chosen(names: list[str] | None) -> Iterator[Check]:
    """Yield the checks with these names, in the order of ``CHECKS``; None yields all."""
    yield from (check for check in CHECKS if names is None or check.name in names)
