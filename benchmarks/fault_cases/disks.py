"""Disks that fill up or turn read-only: a tmpfs of a few hundred kilobytes, which needs root."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_cases.kills import Undisturbed, finished, lost
from fault_cases.runs import Run
from fault_cases.servers import Server

Event = dict[str, Any]


def mount(*arguments: str) -> bool:
    """Run mount; return whether it worked."""
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Callable[..., None]]:
    """Mount a file system of ``size`` bytes; yield what changes its options.

    Raises:
        PermissionError: this user may not mount one.
    """
    place.mkdir(parents=True)
    if not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)):
        raise PermissionError("not run: mounting a small tmpfs needs root")

    def change(option: str) -> None:
        for _ in range(500):  # "busy" while a file is open for writing
            if mount("-o", f"remount,{option}", str(place)):
                return
            time.sleep(0.01)
        raise OSError(f"{place} cannot be remounted with {option}")

    try:
        yield change
    finally:
        subprocess.run(["umount", str(place)], capture_output=True)


def not_run(case: str, what: str, error: Exception) -> Event:
    """Say why a case was left out."""
    return {"case": case, "strategy": "-", "what": what, "not_run": str(error), "fault": ""}


def stopped(run: Run, case: str, what: str, words: str) -> Event:
    """Wait for a run that cannot go on: exit code 1, one line with ``words`` in it."""
    code, line = run.wait(), run.last_line()
    fault = "" if code == 1 and line.startswith("error: ") and words in line else f"{code}: {line}"
    fault = "a traceback" if not fault and run.traceback() else fault
    return {"case": case, "strategy": run.strategy, "what": what, "code": code, "line": line,
            **lost(run), "fault": fault}  # fmt: skip


def size_of(path: Path) -> int:
    """Return the bytes of a file or a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def disk(folder: Path, plain: Undisturbed, seed: int) -> Iterator[Event]:
    """Fill the disk during checkpoint, export and weight push."""
    for strategy in ("single", "fsdp2"):
        try:
            yield from full_checkpoint(folder / f"disk-{strategy}", plain, strategy)
        except PermissionError as error:
            yield not_run("disk", f"checkpoint, {strategy}", error)
    for what, work in (("export", full_export), ("weight push", full_push)):
        for strategy in ("single", "ddp"):
            try:
                yield from work(folder / f"disk-{what.split()[0]}-{strategy}", plain, strategy)
            except PermissionError as error:
                yield not_run("disk", f"{what}, {strategy}", error)


def full_checkpoint(folder: Path, plain: Undisturbed, strategy: str) -> list[Event]:
    """Give checkpoints room for one and a half."""
    one = size_of(plain.run(strategy).checkpoints()[0])
    with small_disk(folder / "small", one * 3 // 2) as change:
        run = Run(folder, strategy, plain.models, (f"--checkpoint.dirpath={folder / 'small'}",))
        run.start()
        event = stopped(run, "disk", "full at a checkpoint", "No space left on device")
        left = [p.name for p in (folder / "small").iterdir()]
        if not event["fault"] and left != ["step=00000004.ckpt"]:
            event["fault"] = f"{left} are left"
        change(f"size={10 * one}")
        run.start()
        return [event, finished(run, plain.run(strategy), "disk")]


def full_export(folder: Path, plain: Undisturbed, strategy: str) -> list[Event]:
    """Give the run folder room for its logs, and not for the student; checkpoints are elsewhere."""
    saved = folder / "checkpoints"
    with small_disk(folder / "small", 192 << 10) as change:
        run = Run(folder / "small", strategy, plain.models, (f"--checkpoint.dirpath={saved}",))
        run.start()
        event = stopped(run, "disk", "full at the export", "No space left on device")
        if not event["fault"] and ("--ckpt_path" not in event["line"] or run.student()):
            event["fault"] = f"no cure, or half a student: {event['line']}"
        event |= {"kept_step": max(int(p.name[5:13]) for p in saved.iterdir()), "lost_updates": 0}
        change("size=64m")
        run.start()
        return [event, finished(run, plain.run(strategy), "disk")]


def full_push(folder: Path, plain: Undisturbed, strategy: str) -> list[Event]:
    """Give the weights for the servers room for one push, which stays until the next is there."""
    size = size_of(Path(plain.models[0]) / "model.safetensors") * 3 // 2
    with small_disk(folder / "small", size) as change, Server(plain.models[0]) as server:
        flags = (*server.flags(), f"--data.rollout_engine.weights_folder={folder / 'small'}")
        run = Run(folder / "run", strategy, plain.models, flags)
        run.start()
        event = stopped(run, "disk", "full at a weight push", "No space left on device")
        change("size=64m")
        run.start()
        other = plain.run(strategy, *server.flags())
        return [event, finished(run, other, "disk")]


def permission(folder: Path, plain: Undisturbed, seed: int) -> Iterator[Event]:
    """Take the permission to write away: in the middle, and from the start."""
    for strategy in ("single", "fsdp2"):
        place = folder / f"permission-{strategy}"
        try:
            with small_disk(place / "small", 64 << 20) as change:
                flags = (f"--checkpoint.dirpath={place / 'small'}",)
                run = Run(place, strategy, plain.models, flags)
                run.start()
                run.until(run.checkpoints)
                change("ro")
                what = "read-only after the first checkpoint"
                yield stopped(run, "permission", what, "Read-only file system")
                run.start()
                what = "read-only from the start"
                yield stopped(run, "permission", what, "Read-only file system")
                change("rw")
                run.start()
                yield finished(run, plain.run(strategy), "permission")
        except PermissionError as error:
            yield not_run("permission", f"read-only, {strategy}", error)
