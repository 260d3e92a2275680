"""Measures start time and memory of a run on a large prompt source, in memory or in files.

    OMP_NUM_THREADS=1 python benchmarks/data_at_scale.py [--rows 1000000]

A run of one update with the embedded student reads each source in a separate process. The columns
are seconds until the source exists, seconds of setup up to the first rollout, peak memory above
that of the same run on 100 rows in MB, and size of the source (its file, or its objects) in MB.
Writing the files, into a temporary folder, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("generated", "list", "jsonl", "jsonl mixed", "parquet", "csv")


def row(number: int) -> dict[str, str]:
    return {"prompt": f"{number % 10_000:04d}+{number % 9_973:04d}=", "answer": f"{number % 7}"}


def write(folder: Path, rows: int) -> None:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row(i)) + "\n" for i in range(rows))
    columns = {name: [row(i)[name] for i in range(rows)] for name in row(0)}
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    pyarrow.csv.write_csv(table, folder / "rows.csv")


def load(kind: str, rows: int, folder: Path) -> Any:
    """Return the source and its size in bytes."""
    from kdrl_lightning import HFPrompts, JSONLPrompts, MixedPrompts
    from kdrl_lightning.tiny import ColumnAddition

    if kind == "generated":
        return ColumnAddition(rows), 0
    if kind == "list":
        before = peak()
        return (made := [row(i) for i in range(rows)]), (peak() - before) * bool(made)
    name, _, mixed = kind.partition(" ")
    path = folder / f"rows.{name}"
    source: Any = JSONLPrompts(str(path)) if name == "jsonl" else HFPrompts(str(path))
    if mixed:
        source = MixedPrompts({"file": source, "made": ColumnAddition(rows)}, size=rows)
    return source, path.stat().st_size


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(kind: str, rows: int, folder: Path) -> dict[str, float]:
    import lightning.pytorch as pl

    from kdrl_lightning import GRPO, KDRLModule, RolloutDataModule, RolloutSettings
    from kdrl_lightning.tiny.models import TinyModel

    class FirstRollout(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            times.append(time.perf_counter())

    times = [time.perf_counter()]
    source, size = load(kind, rows, folder)
    times.append(time.perf_counter())
    data = RolloutDataModule(
        source, lambda sample: len(sample.ids) % 2, rollout=RolloutSettings(max_tokens=8)
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[FirstRollout()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(KDRLModule(TinyModel("student"), GRPO()), data)
    return {"load": times[1] - times[0], "start": times[2] - times[1], "peak": peak(), "size": size}


def measured(kind: str, rows: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--kind", kind, "--rows", str(rows), "--folder", folder]
    home = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(list(map(str, command)), env=home, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(run(args.kind, args.rows, args.folder)))
        return
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        write(Path(few), 100)
        write(Path(many), args.rows)
        seconds = "seconds to read the source | seconds to start"
        print(f"| {args.rows:,} rows | {seconds} | memory MB | source MB |")
        print("| --- | --- | --- | --- | --- |")
        for kind in KINDS:
            small = measured(kind, 100, Path(few))
            large = measured(kind, args.rows, Path(many))
            memory, size = ((v / 2**20) for v in (large["peak"] - small["peak"], large["size"]))
            print(
                f"| {kind} | {large['load']:.1f} | {large['start']:.1f} | {memory:.0f} | "
                f"{size:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
