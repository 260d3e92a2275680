"""Measures what teacher and statistics add to a step: KDRL and RLAD against GRPO.

    python benchmarks/shares.py [--model embedded] [--steps 3] [--rounds 3]

The model is a random Qwen2 with SmolLM2's width and vocabulary and fewer layers, or the embedded
student; the teacher has the student's size. The methods take turns in one process with one thread.
Figures are medians of the CPU seconds of whole steps, generation included. The statistics are the
hooks of ``SelectiveImitationStats``, including histograms and logging.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peers.job
import peers.ours
import scaling
import torch
from peers.job import Job
from vs_trl import EMBEDDED

SPENT = [0.0]


class TimedStats(peers.ours.SelectiveImitationStats):
    """Adds up the seconds of its hook."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        started = time.process_time()
        super().on_train_batch_end(*args, **kwargs)
        SPENT[0] += time.process_time() - started


WIDE = {"prompts": 2, "group": 8, "micro": 8, "tokens": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["wide", "embedded"], default="wide")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    vars(peers.ours)["SelectiveImitationStats"] = TimedStats
    time.perf_counter = time.process_time  # other processes of the machine do not count
    scaling.WIDTH = 576
    found: dict[str, list[tuple[float, float]]] = {"grpo": [], "kdrl": [], "rlad": []}
    with tempfile.TemporaryDirectory() as folder:
        work_of: dict[str, Any] = EMBEDDED
        if args.model == "wide":
            scaling.make_model(Path(folder), 49_152, tied=True)
            work_of = {**WIDE, "model": folder}
        for _ in range(args.rounds):
            for work, steps in found.items():
                SPENT[0] = 0.0
                same: dict[str, Any] = {"side": "ours", "work": work, "threads": 1, "seed": 0}
                same |= {"fixed": False, "checkpointing": False, "precision": "32"}
                step = peers.ours.run(Job(**{**same, **work_of, "steps": args.steps}))["step"]
                steps.append((step, SPENT[0] / (args.steps + 1) / step))
    for work, steps in found.items():
        seconds, metrics = (statistics.median(x) for x in zip(*steps, strict=True))
        more = statistics.median(
            s / g - 1 for (s, _), (g, _) in zip(steps, found["grpo"], strict=True)
        )
        print(f"{work}: {seconds:.3g} s, {more:+.1%}; statistics {metrics:.2%}")


if __name__ == "__main__":
    main()
