"""Strikes small runs with faults on purpose, and counts what is lost.

Processes are killed at random moments (all of a run, or one rank), Ctrl-C is pressed, disks fill up
or turn read-only, checkpoints are cut short or get a flipped bit, rewards and servers die. After
each fault the same command is run again, and what comes out must equal an undisturbed run byte for
byte: the exported student, and every logged number that no clock decides.

Everything happens on this machine, on loopback. The disks are small ones in memory, which need root
(Linux); without it these cases say that they were not run. Writes ``faults.json`` into --out, and
the page ``faults.md`` beside that folder; exits with 1 if a fault did harm.

    python benchmarks/faults.py --out docs/faults --kills 100 --seed 0 [--only kill,disk]
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from fault_cases import damage, disks, kills, servers  # noqa: E402
from fault_cases.runs import UPDATES, save_models  # noqa: E402

Event = dict[str, Any]
CASES: dict[str, tuple[str, Callable[..., Iterator[Event]]]] = {
    "kill": ("SIGKILL at a random moment, to all processes or one rank", kills.kill),
    "interrupt": ("Ctrl-C at a random moment", kills.interrupt),
    "reward": ("processes of the reward are killed", servers.reward),
    "server": ("the server that samples dies, for good or for a moment", servers.server),
    "disk": ("the disk is full: checkpoint, export, weights for the servers", disks.disk),
    "permission": ("the disk turns read-only", disks.permission),
    "damage": ("files of a checkpoint are cut short, or have a flipped bit", damage.damage),
}
PAGE = """# Faults on purpose

`benchmarks/faults.py` strikes small runs ({steps} updates a rollout, a checkpoint after each
rollout) on one device, two processes under `ddp` and two under `fsdp2`. After each fault we start
the same command again with `--ckpt_path last`. At its end the exported student and all logged
numbers equal those of an undisturbed run byte for byte. At most the current rollout is lost.

{table}
{note}
Seed {seed}; {seconds:.0f} s on {machine}. Every fault with its moment:
[faults.json](faults/faults.json). To repeat it:

```bash
python benchmarks/faults.py --out docs/faults --kills {kills} --seed {seed}
```

An engine inside the training process (`VLLMEngine`) dies with it, which is the first row. A flip
that is not refused hit one of an archive's unused bytes: the values that are read are the same.

What a user sees:

- A checkpoint is compared with its checksums before it is read. A damaged one is refused with the
  name of the file and of an earlier checkpoint that is whole; `last` passes over it with a warning.
  With `keep_last: 1` there may be no earlier one: set `--checkpoint.keep_last 2` if you do not
  trust the disk.
- If the disk is full or read-only at a checkpoint, all processes stop with one line; earlier
  checkpoints stay, and what was half written is deleted. If it is full at the end, the line names
  the checkpoint that holds the student, and the command that exports it. An export never replaces
  a model before the new one is complete.
- A process of a reward that dies is replaced, and its call is made once more; if that dies too, the
  completion counts as a failure of the reward.
- A server that is away for less than `max_away_s` gets its weights again; after that the run stops
  with its URL.
"""
HEAD = """| fault | times | same end after it | most updates lost | harm |
| --- | --- | --- | --- | --- |"""


def row(case: str, events: list[Event]) -> str:
    """One line of the table."""
    mine = [e for e in events if e["case"] == case and "not_run" not in e]
    ends = [e for e in mine if e.get("end")]
    struck = sum(e.get("times", 1) for e in mine)
    same = sum(not e["fault"] for e in ends)
    lost = max((e.get("lost_updates", 0) for e in mine), default=0)
    bad = sum(bool(e["fault"]) for e in mine)
    text = CASES[case][0]
    if not mine:
        return f"| {text} | not run | | | |"
    return f"| {text} | {struck} | {same} of {len(ends)} | {lost} | {bad or 'none'} |"


def table(events: list[Event]) -> str:
    """What was struck, what was lost."""
    return "\n".join([HEAD, *(row(case, events) for case in CASES), ""])


def harmed(event: Event) -> str:
    """Return what a fault has harmed: its own words, or more than the current rollout."""
    if not event["fault"] and not kills.within_a_rollout(event):
        return f"{event['lost_updates']} updates are lost"
    return str(event["fault"])


def watched(case: str, events: Iterator[Event]) -> Iterator[Event]:
    """Let the other cases be tried if one of them cannot go on."""
    try:
        yield from events
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        yield {"case": case, "strategy": "-", "what": "stopped", "times": 0, "fault": fault}


def cut(value: Any, folder: str) -> Any:
    """Leave out of a text where the runs were."""
    return value.replace(folder, "") if isinstance(value, str) else value


def main() -> None:
    text = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--out", type=Path, required=True, help="folder for faults.json")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs, over all strategies")
    parser.add_argument("--interrupts", type=int, default=10, help="Ctrl-Cs, over all strategies")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(CASES):
        parser.error(f"--only must name some of {', '.join(CASES)}: got {', '.join(unknown)}")
    # A shell lets what runs in the background ignore Ctrl-C, and so would the runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begun, events = time.monotonic(), []
    counts = {"kill": args.kills, "interrupt": args.interrupts}
    with tempfile.TemporaryDirectory(prefix="kdrl-faults-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        plain = kills.Undisturbed(folder, save_models(folder / "models"))
        for case in [c for c in CASES if c in chosen]:
            count = [counts[case]] if case in counts else []
            for event in watched(case, CASES[case][1](folder / case, plain, *count, args.seed)):
                event["fault"] = harmed(event)
                event = {k: cut(v, name) for k, v in event.items()}
                events.append(event)
                print(" ".join(f"{k}={v}" for k, v in event.items() if v != ""), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "faults.json").write_text(json.dumps(events, indent=1) + "\n")
    missing = sorted({e["not_run"] for e in events if "not_run" in e})
    page = PAGE.format(
        steps=UPDATES, table=table(events), note="".join(f"{text}.\n\n" for text in missing),
        seed=args.seed, kills=args.kills, seconds=time.monotonic() - begun,
        machine=f"{platform.machine()} with one thread a process",
    )  # fmt: skip
    (args.out.parent / "faults.md").write_text(page)
    print(table(events))
    raise SystemExit(any(e["fault"] for e in events))


if __name__ == "__main__":
    main()
