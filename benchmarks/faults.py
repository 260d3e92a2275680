"""Injects faults into small runs, and counts what they lose.

Processes are killed at random moments (all of a run, or one rank), Ctrl-C is pressed, disks fill up
or turn read-only, checkpoints are cut short or get a flipped bit, rewards and servers die. After
each fault the same command runs again, and its results must equal an undisturbed run byte for
byte: the exported student, and every logged number that does not depend on a clock.

Everything runs on one machine, on loopback. The disks are small and in memory, which needs root
(Linux); without root these cases report that they were not run. The script writes ``faults.json``
into --out, and the page ``faults.md`` beside that folder; it exits with 1 if a fault did harm.

A campaign has parts, e.g. ``disk ddp export``. Each part is in ``faults.json`` as soon as it is
done. The same command skips these, so a stopped campaign continues, and ``--only`` adds parts.
``--again`` repeats them, e.g. after a repair.

    python benchmarks/faults.py --out docs/faults --kills 100 --seed 0 [--only "kill ddp,disk"]
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from fault_cases import campaign, kills  # noqa: E402
from fault_cases.campaign import CASES, Event, Part  # noqa: E402
from fault_cases.runs import UPDATES, save_models  # noqa: E402

PAGE = """# Faults on purpose

`benchmarks/faults.py` injects faults into small runs ({steps} updates per rollout, a checkpoint
after it) on one device, two processes under `ddp` and two under `fsdp2`. After each fault we start
the same command again with `--ckpt_path last`; some runs get several faults. When a run ends, the
exported student and all logged numbers must equal those of an undisturbed run byte for byte. A
fault costs at most the updates of the current rollout.

{table}
{note}
Seed {seed}; {seconds:.0f} s on {machine}. Every fault and its moment are in
[faults.json](faults/faults.json). To repeat the campaign:

```bash
python benchmarks/faults.py --out docs/faults --kills {kills} --seed {seed}
```

{others}An engine in the training process (`VLLMEngine`) dies with that process, so the first row
covers it. A flipped bit that is not refused is in an unused byte of an archive and changes no
value.

What a user sees:

- A run compares a checkpoint with its checksums before it reads it. It refuses a damaged one with
  the name of the file and of an earlier checkpoint that is whole; `last` skips the damaged one with
  a warning. With `keep_last: 1` there may be no earlier one: set `--checkpoint.keep_last 2` if you
  do not trust the disk.
- If the disk is full or read-only at a checkpoint, all processes stop with one line; earlier
  checkpoints stay, and half-written files are deleted. If the disk is full at the end, the line
  names the checkpoint that holds the student, and the command that exports it. An export never
  replaces a model before the new one is complete.
- If a worker process of the reward dies, a new one repeats the call; if that one dies, too, the
  completion counts as a failure of the reward.
- A server that is unreachable for less than `max_away_s` gets its weights again; after that the run
  stops and names the server's URL.
"""
HEAD = """| fault | times | same end after it | most updates lost | harm |
| --- | --- | --- | --- | --- |"""


def row(case: str, done: list[Part]) -> str:
    """Return one line of the table."""
    mine = [e for p in done if p.case == case for e in p.events if "not_run" not in e]
    ends = [e for e in mine if e.get("end")]
    struck = sum(e.get("times", 1) for e in mine)
    same = sum(not e["fault"] for e in ends)
    lost = max((e.get("lost_updates", 0) for e in mine), default=0)
    bad = sum(bool(e["fault"]) for e in mine)
    if not mine:
        return f"| {CASES[case]} | not run | | | |"
    return f"| {CASES[case]} | {struck} | {same} of {len(ends)} | {lost} | {bad or 'none'} |"


def table(done: list[Part]) -> str:
    """Return the table of faults and losses."""
    return "\n".join([HEAD, *(row(case, done) for case in CASES), ""])


def notes(done: list[Part], every: list[Part]) -> str:
    """Return the notes below the table: each harm, and the parts that were not run."""
    events = [(part, event) for part in done for event in part.events]
    harms = [f"- {harm(part, event)}" for part, event in events if event["fault"]]
    text = "\n".join(["What the column *harm* counts:", "", *harms, "", ""]) if harms else ""
    refused = sorted({event["not_run"] for _, event in events if "not_run" in event})
    left = [part.name for part in every if not any(part.same(p) for p in done)]
    refused += [f"Not run yet: {', '.join(left)}"] if left else []
    return text + "".join(f"{line}.\n\n" for line in refused)


def others(out: Path) -> str:
    """Return a paragraph on smaller campaigns with other moments, ``faults-*.json`` in a folder."""
    lines = []
    for file in sorted(out.glob("faults-*.json")):
        done = campaign.load(file)
        events = [event for part in done for event in part.events if "not_run" not in event]
        ends = [event for event in events if event.get("end")]
        kills = sum(part.count for part in done if part.case == "kill")
        presses = sum(part.count for part in done if part.case == "interrupt")
        lost = max((event.get("lost_updates", 0) for event in events), default=0)
        bad = sum(bool(event["fault"]) for event in events)
        cases = ", ".join(dict.fromkeys(part.case for part in done))
        lines.append(
            f"- Seed {done[0].seed}, {kills} kills and {presses} Ctrl-C ({cases}): the same end "
            f"after {sum(not e['fault'] for e in ends)} of {len(ends)}, most updates lost {lost}, "
            f"harm {bad or 'none'} ([{file.name}](faults/{file.name}))."
        )
    return (
        "\n".join(
            [
                "More runs, with faults at other moments (each file has only what we measured "
                "after its last fix):",
                "",
                *lines,
                "",
                "",
            ]
        )
        if lines
        else ""
    )


def harm(part: Part, event: Event) -> str:
    """Return a line of the page for one harm."""
    moment = f", at {event['moment']}" if event.get("moment") else ""
    return f"{part.name}, {event['what']}{moment}: `{event['fault'].replace('`', chr(39))}`"


def write_page(out: Path, done: list[Part], every: list[Part], kills: int, seed: int) -> None:
    """Write the page beside the folder of ``faults.json``."""
    page = PAGE.format(
        steps=UPDATES, table=table(done), note=notes(done, every), seed=seed, kills=kills,
        others=others(out),
        seconds=sum(part.seconds for part in done),
        machine=f"{platform.machine()} with one thread per process",
    )  # fmt: skip
    (out.parent / "faults.md").write_text(page)


def main() -> None:
    text = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--out", type=Path, required=True, help="folder for faults.json")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs, over all strategies")
    parser.add_argument("--interrupts", type=int, default=10, help="Ctrl-Cs, over all strategies")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument(
        "--only", default="", help="beginnings of names of parts, separated by commas"
    )
    parser.add_argument("--again", action="store_true", help="repeat parts that are done")
    args = parser.parse_args()
    every = campaign.parts(args.kills, args.interrupts, args.seed)
    try:
        wanted = campaign.chosen(every, [name for name in args.only.split(",") if name])
    except ValueError as error:
        parser.error(str(error))
    # A background process of a shell ignores Ctrl-C, and the runs would inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "faults.json"
    # Another seed or number of kills starts another campaign.
    done = [p for p in campaign.load(file) if any(p.same(q) for q in every)]
    with tempfile.TemporaryDirectory(prefix="kdrl-faults-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        plain = kills.Undisturbed(folder, save_models(folder / "models"))
        for part in wanted:
            if args.again or not any(part.same(p) for p in done):
                print(f"--- {part.name}", flush=True)
                campaign.strike(part, folder, plain)
                done = campaign.merged(done, part, every)
                campaign.save(file, done)
                write_page(args.out, done, every, args.kills, args.seed)
    write_page(args.out, done, every, args.kills, args.seed)
    print(table(done))
    raise SystemExit(any(event["fault"] for part in done for event in part.events))


if __name__ == "__main__":
    main()
