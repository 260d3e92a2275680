"""Fills disks or makes them read-only during a run, with a small tmpfs, which needs root."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_cases.kills import Undisturbed, finished, lost
from fault_cases.runs import Run, step_of
from fault_cases.servers import Server

Event = dict[str, Any]


def mount(*arguments: str) -> bool:
    """Run mount; return whether it worked."""
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@contextmanager
def small_disk(place: Path) -> Iterator[Callable[[str], None]]:
    """Mount a file system of 64 MiB; yield a function that changes its options.

    Raises:
        PermissionError: the user may not mount file systems.
    """
    place.mkdir(parents=True)
    if not mount("-t", "tmpfs", "-o", f"size={64 << 20}", "tmpfs", str(place)):
        raise PermissionError("not run: mounting a small tmpfs needs root")

    def change(option: str) -> None:
        for _ in range(500):  # the disk is busy while a file is open for writing
            if mount("-o", f"remount,{option}", str(place)):
                return
            time.sleep(0.01)
        raise OSError(f"{place} cannot be remounted with {option}")

    try:
        yield change
    finally:
        subprocess.run(["umount", str(place)], capture_output=True)


def fill(place: Path, leave: int) -> Path:
    """Fill a disk until some bytes are left; return the file to delete."""
    ballast = place / "ballast"
    for _ in range(100):
        found = os.statvfs(place)
        try:
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - leave)
            return ballast
        except OSError:  # the run has written in this time
            ballast.unlink()
    raise OSError(f"{place} cannot be filled")


def stopped(run: Run, case: str, what: str, words: str, codes: tuple[int, ...] = (1,)) -> Event:
    """Wait for a run that cannot continue; expect one line that contains ``words``."""
    code, line = run.wait(), run.last_line()
    told = code in codes and line.startswith("error: ") and words in line
    fault = "" if told else f"{code}: {line}"
    fault = "a traceback" if not fault and run.traceback() else fault
    return {"case": case, "strategy": run.strategy, "what": what, "code": code, "line": line,
            **lost(run), "fault": fault}  # fmt: skip


def fill_between_pushes(run: Run, place: Path, leave: int) -> Path:
    """Fill a disk while it holds one set of weights; deleting an older set makes room."""
    for _ in range(1000):
        with run.held():
            if len(list(place.glob("kdrl-weights-*"))) == 1:
                return fill(place, leave)
        time.sleep(0.002)
    raise OSError(f"{place} never holds one set of weights")


def size_of(path: Path) -> int:
    """Return the bytes of a file or a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def disk(folder: Path, plain: Undisturbed, strategy: str, what: str, seed: str) -> Iterator[Event]:
    """Fill the disk during a checkpoint, the export or a weight push."""
    cases = {"checkpoint": full_checkpoint, "export": full_export, "push": full_push}
    yield from cases[what](folder, plain, strategy)


def full_checkpoint(folder: Path, plain: Undisturbed, strategy: str) -> Iterator[Event]:
    """Leave room for half of the second checkpoint."""
    one, place = size_of(plain.run(strategy).checkpoints()[0]), folder / "small"
    with small_disk(place):
        run = Run(folder, strategy, plain.models, (f"--checkpoint.dirpath={place}",))
        run.start()
        run.until(run.checkpoints)
        ballast = fill(place, one // 2)
        event = stopped(run, "disk", "full at a checkpoint", "No space left on device")
        ballast.unlink()
        left = sorted(p.name for p in place.iterdir())  # a slow machine may have saved two
        whole = all(re.fullmatch(r"step=\d+\.ckpt", name) for name in left)
        if not event["fault"] and not (left and whole):
            event["fault"] = f"{left} are left"
        yield event
        run.start()
        yield finished(run, plain.run(strategy), "disk")


def full_export(folder: Path, plain: Undisturbed, strategy: str) -> Iterator[Event]:
    """Leave room for the logs, but not for the student."""
    saved, place = folder / "checkpoints", folder / "small"
    with small_disk(place):
        run = Run(place, strategy, plain.models, (f"--checkpoint.dirpath={saved}",))
        run.start()
        run.until(run.steps)
        ballast = fill(place, size_of(Path(plain.models[0]) / "model.safetensors") // 2)
        event = stopped(run, "disk", "full at the export", "No space left on device")
        if not event["fault"] and ("--ckpt_path" not in event["line"] or run.student()):
            event["fault"] = f"no cure, or half a student: {event['line']}"
        kept = max(map(step_of, saved.iterdir()))
        yield {**event, "kept_step": kept, "lost_updates": max(0, run.steps()[-1] - kept)}
        ballast.unlink()
        run.start()
        yield finished(run, plain.run(strategy), "disk")


def full_push(folder: Path, plain: Undisturbed, strategy: str) -> Iterator[Event]:
    """Leave room for half of the weights for the servers."""
    place, size = folder / "small", size_of(Path(plain.models[0]) / "model.safetensors")
    with small_disk(place), Server(plain.models[0]) as server:
        other = plain.run(strategy, *server.flags())
        flags = (*server.flags(), f"--data.rollout_engine.weights_folder={place}")
        run = Run(folder / "run", strategy, plain.models, flags)
        run.start()
        run.until(run.steps)
        ballast = fill_between_pushes(run, place, size // 2)
        yield stopped(run, "disk", "full at a weight push", "No space left on device")
        ballast.unlink()
        run.start()
        yield finished(run, other, "disk")


def permission(folder: Path, plain: Undisturbed, strategy: str, seed: str) -> Iterator[Event]:
    """Remove the permission to write, in the middle or from the start."""
    place = folder / "small"
    with small_disk(place) as change:
        run = Run(folder, strategy, plain.models, (f"--checkpoint.dirpath={place}",))
        run.start()
        run.until(run.checkpoints)
        change("ro")
        what = "read-only after the first checkpoint"
        yield stopped(run, "permission", what, "Read-only file system")
        run.start()
        what = "read-only from the start"
        yield stopped(run, "permission", what, "Read-only file system", (1, 2))
        change("rw")
        run.start()
        yield finished(run, plain.run(strategy), "permission")
