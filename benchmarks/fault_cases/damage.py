"""Damages checkpoints, and checks that they are refused or read as they were written."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fault_cases.kills import Undisturbed, finished
from fault_cases.runs import Run

Event = dict[str, Any]
FLIPS = 40


def damage(folder: Path, plain: Undisturbed, strategy: str, seed: str) -> Iterator[Event]:
    """Damage each file of the newest checkpoint in many ways, and resume from some."""
    whole = plain.run(strategy)
    path = whole.checkpoints()[-1]
    names = [""] if path.is_file() else sorted(p.name for p in path.iterdir())
    for name in names:
        yield in_every_way(path, name, strategy, random.Random(f"{seed} {name}"))
    for way in ("cut", "flip"):
        yield resumed_from_older(folder / way, whole, way, names[-1])


def in_every_way(path: Path, name: str, strategy: str, draw: random.Random) -> Event:
    """Read one checkpoint repeatedly, with one file damaged at its head, middle or end."""
    wanted, file = contents(path), path / name if name else path
    raw = file.read_bytes()
    places = {0, 1, len(raw) // 2, len(raw) - 1, *draw.sample(range(len(raw)), FLIPS)}
    ways = [("cut", place) for place in sorted(places)] + [("flip", p) for p in sorted(places)]
    refused, wrong, kept_times = 0, "", (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    try:
        for way, place in ways:
            file.write_bytes(damaged(raw, way, place))
            try:
                if not equal(contents(path), wanted):
                    wrong = wrong or f"{way} at byte {place} of {len(raw)}: other values are read"
            except ValueError as error:
                refused += 1
                if "\n" in str(error) or "--ckpt_path" not in str(error):
                    wrong = wrong or f"{way} at byte {place}: {error}"
    finally:
        file.write_bytes(raw)
        os.utime(path, ns=kept_times)
    return {"case": "damage", "strategy": strategy, "what": name or "the file", "times": len(ways),
            "refused": refused, "harmless": len(ways) - refused, "fault": wrong}  # fmt: skip


def damaged(raw: bytes, way: str, place: int) -> bytes:
    """Return bytes that are cut short at a position, or have a flipped bit there."""
    rest = b"" if way == "cut" else bytes([raw[place] ^ 16]) + raw[place + 1 :]
    return raw[:place] + rest


def contents(path: Path) -> dict[str, Any]:
    """Return all that ``fit`` and ``export`` read of a checkpoint."""
    import torch.distributed.checkpoint as dcp

    from kdrl_lightning.checkpoints.reader import read_metadata

    values = read_metadata(str(path))
    if path.is_file():
        loaded: dict[str, Any] = torch.load(path, weights_only=True)
        return loaded
    index = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else 0
        for name, entry in index.items()
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return {**values, **state}


def equal(a: object, b: object) -> bool:
    """Return whether two states hold the same values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def resumed_from_older(folder: Path, whole: Run, way: str, name: str) -> Event:
    """Damage the newest checkpoint of a copy, and check that ``last`` takes the one before."""
    shutil.copytree(whole.folder, folder, copy_function=shutil.copy2)
    run = Run(folder, whole.strategy, whole.models)
    newest = run.checkpoints()[-1]
    file = newest / name if name else newest
    raw = file.read_bytes()
    times = (newest.stat().st_atime_ns, newest.stat().st_mtime_ns)
    # A byte of weights or moments, which are most of the file.
    file.write_bytes(damaged(raw, way, len(raw) // 2))
    os.utime(newest, ns=times)
    for student in folder.rglob("student"):
        shutil.rmtree(student)
    run.start()
    event = finished(run, whole, "damage")
    said = run.beside("err").read_text() + run.beside("out").read_text()
    if not event["fault"] and "skips" not in said:
        event["fault"] = "it does not say that it skips a damaged checkpoint"
    return {**event, "what": f"`last` after {way} of {name or 'the file'}", "times": 1}
