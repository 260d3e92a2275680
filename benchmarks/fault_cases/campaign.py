"""Runs a campaign in parts, and stores finished parts, so that a stopped one continues."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fault_cases import damage, disks, kills, servers
from fault_cases.runs import STRATEGIES

Event = dict[str, Any]
ROUND = 12  # kills of a part, which is lost if the campaign is stopped within it
# Per case its row in the table.
CASES = {
    "kill": "SIGKILL at a random moment, to all processes or one rank",
    "interrupt": "Ctrl-C at a random moment",
    "reward": "the reward's processes are killed",
    "server": "the sampling server dies, for good or for a moment",
    "disk": "the disk is full at a checkpoint, an export, or a push of weights to the servers",
    "permission": "the disk turns read-only",
    "damage": "a checkpoint's files are cut short or have a flipped bit",
}


@dataclass
class Part:
    """A part of a campaign, with its results.

    Attributes:
        name: case and strategy, with what distinguishes it from other parts.
        seed: seed of its random moments.
        count: number of faults at random moments; 0 if the case fixes the number.
        seconds: duration.
        events: one per fault, and one per end that was compared.
    """

    name: str
    seed: int
    count: int = 0
    seconds: float = 0.0
    events: list[Event] = field(default_factory=list)

    @property
    def case(self) -> str:
        """Key of ``CASES``."""
        return self.name.split()[0]

    @property
    def words(self) -> list[str]:
        """What distinguishes the part from others of its case."""
        return self.name.split()[1:]

    def replaces(self, other: Part) -> bool:
        """Return whether another part uses the same runs."""
        return self.name == other.name

    def same(self, other: Part) -> bool:
        """Return whether another part uses the same runs and moments."""
        return (self.name, self.seed, self.count) == (other.name, other.seed, other.count)


def parts(kills: int, interrupts: int, seed: int) -> list[Part]:
    """Return all parts of a campaign."""
    out = []
    for index, strategy in enumerate(STRATEGIES):
        left, number = kills // len(STRATEGIES) + (index < kills % len(STRATEGIES)), 0
        while left:
            count, number = min(ROUND, left), number + 1
            out.append(Part(f"kill {strategy} {number}", seed, count))
            left -= count
    for index, strategy in enumerate(STRATEGIES):
        count = interrupts // len(STRATEGIES) + (index < interrupts % len(STRATEGIES))
        out += [Part(f"interrupt {strategy}", seed, count)] if count else []
    fixed = {
        "reward": ("single", "ddp"),
        "server": ("single", "ddp"),
        "disk": ("single checkpoint", "fsdp2 checkpoint", "single export", "ddp export",
                 "single push", "ddp push"),
        "permission": ("single", "fsdp2"),
        "damage": ("single", "fsdp2"),
    }  # fmt: skip
    return out + [Part(f"{case} {words}", seed) for case, names in fixed.items() for words in names]


def chosen(every: list[Part], names: list[str]) -> list[Part]:
    """Return the parts that begin with one of the names; all parts without names.

    Raises:
        ValueError: no part begins with a name.
    """

    def begins(name: str, part: Part) -> bool:
        return f"{part.name} ".startswith(f"{name.strip()} ")

    for name in names:
        if not any(begins(name, part) for part in every):
            known = ", ".join(part.name for part in every)
            raise ValueError(f"--only must name some of {known}: got {name}")
    return [p for p in every if not names or any(begins(name, p) for name in names)]


def strike(part: Part, folder: Path, plain: kills.Undisturbed) -> None:
    """Run a part; an error in it becomes an event, so that the other parts still run."""
    work: dict[str, Callable[..., Iterator[Event]]] = {
        "kill": kills.kill, "interrupt": kills.interrupt, "reward": servers.reward,
        "server": servers.server, "disk": disks.disk, "permission": disks.permission,
        "damage": damage.damage,
    }  # fmt: skip
    begun, part.events = time.monotonic(), []
    arguments = [*part.words[:1], *([part.count] if part.count else part.words[1:])]
    folder = folder / part.name.replace(" ", "-")
    seed = f"{part.seed} {part.name}"
    try:
        for event in work[part.case](folder, plain, *arguments, seed=seed):
            event["fault"] = harmed(event)
            part.events.append({k: without(v, str(plain.folder)) for k, v in event.items()})
            print(" ".join(f"{k}={v}" for k, v in event.items() if v != ""), flush=True)
    except PermissionError as error:
        part.events.append({"not_run": str(error), "what": part.name, "fault": ""})
    except Exception as error:
        fault = f"the harness stopped: {type(error).__name__}: {error}"
        part.events.append({"what": part.name, "times": 0, "fault": fault})
        print(fault, flush=True)
    part.seconds = round(time.monotonic() - begun, 1)


def harmed(event: Event) -> str:
    """Return the harm of a fault: its description, or a loss beyond the current rollout."""
    if not event["fault"] and not kills.within_a_rollout(event):
        return f"{event['lost_updates']} updates are lost"
    return str(event["fault"])


def without(value: Any, folder: str) -> Any:
    """Return a text without the folder of the runs."""
    return value.replace(folder, "") if isinstance(value, str) else value


def load(file: Path) -> list[Part]:
    """Return the finished parts; none if the file has another format."""
    found = json.loads(file.read_text()) if file.exists() else []
    return [Part(**entry) for entry in found if "events" in entry]


def save(file: Path, done: list[Part]) -> None:
    """Write the finished parts, completely or not at all."""
    half = file.with_suffix(".unfinished")
    half.write_text(json.dumps([asdict(part) for part in done], indent=1) + "\n")
    os.replace(half, file)


def merged(done: list[Part], part: Part, every: list[Part]) -> list[Part]:
    """Return the parts with one more, in the order of a whole campaign."""
    out = [p for p in done if not part.replaces(p)] + [part]
    order = {p.name: index for index, p in enumerate(every)}
    return sorted(out, key=lambda p: order.get(p.name, len(order)))
