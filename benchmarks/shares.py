"""What the teacher and the statistics add to a step: KDRL and RLAD beside GRPO, student as teacher.

    python benchmarks/shares.py [--tokens 64] [--steps 3]

A random Qwen2 with SmolLM2's width and vocabulary and fewer layers; the teacher has the student's
size. CPU seconds of whole steps, generation included, one thread, in one process; the statistics
are the hooks of ``SelectiveImitationStats``, histograms among them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import peers.job
import peers.ours
import scaling
import torch
from peers.job import Job

SPENT = [0.0]


class TimedStats(peers.ours.SelectiveImitationStats):
    """Adds up the seconds of its hook."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        started = time.process_time()
        super().on_train_batch_end(*args, **kwargs)
        SPENT[0] += time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    vars(peers.ours)["SelectiveImitationStats"] = TimedStats
    time.perf_counter = time.process_time  # other processes of the machine do not count
    scaling.WIDTH = 576
    base = 0.0
    with tempfile.TemporaryDirectory() as folder:
        scaling.make_model(Path(folder), 49_152, tied=True)
        for work in ("grpo", "kdrl", "rlad"):
            SPENT[0] = 0.0
            job = Job(
                side="ours",
                model=folder,
                work=work,
                prompts=2,
                group=8,
                micro=8,
                tokens=args.tokens,
                steps=args.steps,
                fixed=False,
                checkpointing=False,
                precision="32",
                threads=1,
                seed=0,
            )
            step = peers.ours.run(job)["step"]
            base = base or step
            metrics = SPENT[0] / (args.steps + 1) / step
            print(f"{work}: {step:.2f} s, {step / base - 1:+.1%}; statistics {metrics:.2%}")


if __name__ == "__main__":
    main()
