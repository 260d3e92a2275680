"""Sends SIGKILL or Ctrl-C at random moments, and compares the results with an undisturbed run."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_cases.runs import PATIENCE, STEPS, STRATEGIES, UPDATES, Run, running, step_of

Event = dict[str, Any]


class Undisturbed:
    """Holds an undisturbed run for each strategy, made at the first request."""

    def __init__(self, folder: Path, models: tuple[str, str]) -> None:
        self.folder, self.models = folder, models
        self._runs: dict[tuple[str, ...], tuple[Run, float]] = {}

    def run(self, strategy: str, *flags: str) -> Run:
        """Return the finished run."""
        return self._timed(strategy, flags)[0]

    def seconds(self, strategy: str) -> float:
        """Return how long the undisturbed run took until its first step."""
        return self._timed(strategy, ())[1]

    def _timed(self, strategy: str, flags: tuple[str, ...]) -> tuple[Run, float]:
        key = (strategy, *flags)
        if key not in self._runs:
            run = Run(self.folder / f"undisturbed-{len(self._runs)}", strategy, self.models, flags)
            begun = time.monotonic()
            run.start()
            run.until(run.steps)
            startup = time.monotonic() - begun
            code = run.wait()
            if code:
                raise RuntimeError(f"{run} ended with {code}: {run.last_line()}")
            self._runs[key] = run, startup
        return self._runs[key]


def kill(folder: Path, plain: Undisturbed, strategy: str, count: int, seed: str) -> Iterator[Event]:
    """Kill all processes or one rank, ``count`` times.

    It resumes one run until that ends, then starts another. After the last kill the run may end.
    Every run that ends is compared with the undisturbed one.
    """
    draw = random.Random(seed)
    chain, run = 0, Run(folder / "0", strategy, plain.models)
    while count or run.process is not None:
        run.start()
        event = strike(run, plain, draw) if count else None
        if event is not None:
            yield event
            count -= 1
            continue
        yield finished(run, plain.run(strategy), "kill")
        chain += 1
        run = Run(folder / str(chain), strategy, plain.models)


def strike(run: Run, plain: Undisturbed, draw: random.Random) -> Event | None:
    """Kill a run that was started at a random moment; None if it had ended before."""
    moment = wait(run, plain, draw, early=0.1)
    one = draw.randrange(2) if STRATEGIES[run.strategy] and draw.random() < 0.5 else None
    if not run.alive():
        return None
    ranks, begun = run.ranks(), time.monotonic()
    run.signal(signal.SIGKILL, one)
    # The others must notice by themselves; the wait for the first one ends them all.
    while any(map(running, ranks)) and time.monotonic() < begun + PATIENCE:
        time.sleep(0.02)
    seconds, code = time.monotonic() - begun, run.wait()
    return {
        "case": "kill",
        "strategy": run.strategy,
        "what": "all" if one is None else f"rank {one}",
        "moment": moment,
        "code": code,
        "seconds_to_end": round(seconds, 1),
        **lost(run),
        "fault": "a rank hangs" if seconds > PATIENCE else "",
    }


def wait(run: Run, plain: Undisturbed, draw: random.Random, early: float) -> str:
    """Wait for a random moment of a run; return its name.

    The moment is within a quarter of a second after a random later step, or, with probability
    ``early``, before the first step.
    """
    startup = plain.seconds(run.strategy)
    done = max(map(step_of, run.checkpoints()), default=0)
    step = draw.randrange(min(done, STEPS - 1), STEPS)
    if draw.random() < early:
        pause, name = draw.uniform(0.2, 0.6) * startup, "start"
    else:
        pause, name = draw.uniform(0.0, 0.25), f"step {step}"
        run.until(lambda: max(run.steps(), default=-1) >= step)
    moment = time.monotonic() + pause
    run.until(lambda: time.monotonic() >= moment)
    return f"{name} + {pause:.2f} s"


def lost(run: Run) -> Event:
    """Return the steps that a killed start has lost."""
    kept = max(map(step_of, run.checkpoints()), default=0)
    begun = run.steps()
    done = begun[-1] if begun else kept
    return {"kept_step": kept, "lost_updates": max(0, done - kept)}


def finished(run: Run, undisturbed: Run, case: str) -> Event:
    """Wait for a run's end, and compare it."""
    code = run.wait()
    differs = run.same_as(undisturbed) if code == 0 else run.last_line()
    run.process = None
    return {"case": case, "strategy": run.strategy, "what": "end", "code": code, "times": 0,
            "end": True, "fault": differs}  # fmt: skip


def interrupt(
    folder: Path, plain: Undisturbed, strategy: str, count: int, seed: str
) -> Iterator[Event]:
    """Press Ctrl-C; expect exit code 130, one line with the checkpoint, and the same end."""
    draw = random.Random(seed)
    for number in range(count):
        for attempt in range(9):  # some runs end before the moment
            run = Run(folder / f"{number}-{attempt}", strategy, plain.models)
            run.start()
            moment = wait(run, plain, draw, early=0.2)
            if run.alive():
                break
            run.wait()
        run.signal(signal.SIGINT)
        code, line = run.wait(), run.last_line()
        # A signal after everything is written may change nothing.
        fault = "" if code in (0, 130) else f"exit code {code}: {line}"
        if code == 0 and not run.student():
            fault = "it was passed over"
        if code == 130:
            fault = interrupted(run, line)
        yield {"case": "interrupt", "strategy": strategy, "what": "Ctrl-C", "code": code,
                       "moment": moment, "line": line, **lost(run),
                       "fault": fault}  # fmt: skip
        run.start()
        yield finished(run, plain.run(strategy), "interrupt")


def interrupted(run: Run, line: str) -> str:
    """Return what is wrong with the last line of an interrupted run."""
    if not line.startswith("error: ") or run.traceback():
        return f"no single line: {line}"
    named = re.findall(r"\S*step=\d+\.ckpt", line)
    if run.checkpoints() and not any((run.folder / name).exists() for name in named):
        return f"it names no checkpoint: {line}"
    return ""


def within_a_rollout(event: Event) -> bool:
    """Return whether only the current rollout was lost."""
    return int(event.get("lost_updates", 0)) <= UPDATES
