"""Runs our side: the library without changes, with its statistics on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from kdrl_lightning import (
    GKD,
    GRPO,
    KDRL,
    RLAD,
    KDRLModule,
    LocalTeacher,
    RolloutDataModule,
    RolloutSettings,
    Sample,
)
from kdrl_lightning.callbacks import SelectiveImitationStats
from kdrl_lightning.engines import Completion, Sampling, TransformersEngine
from peers.job import Clock, Job, given_completions, model_folder, prompts, reward_of

OBJECTIVES = {"grpo": GRPO, "kdrl": KDRL, "rlad": RLAD, "distillation": lambda: GKD(jsd_beta=1.0)}


class TimedEngine(TransformersEngine):
    """Samples, or returns given completions, and reports the time."""

    def __init__(self, clock: Clock, given: list[list[int]] | None) -> None:
        super().__init__()
        self.clock = clock
        self.given = given

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        if self.given is None:
            with self.clock.part("generation"):
                return super().generate(prompts, seeds, sampling)
        rows = iter(self.given)
        return [
            [Completion(i, [0.0] * len(i), True) for _, i in zip(s, rows, strict=False)]
            for s in seeds
        ]


class TimedModule(KDRLModule):
    """Reports the time of scoring."""

    clock: Clock

    def score(self, batch: Any) -> Any:
        with self.clock.part("scoring"):
            return super().score(batch)

    def score_reference(self, batch: Any) -> Any:
        with self.clock.part("scoring"):
            return super().score_reference(batch)

    def score_teacher(self, batch: Any) -> Any:
        with self.clock.part("scoring"):
            return super().score_teacher(batch)


class Steps(pl.Callback):
    """Reports updates and the ends of steps to the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.tokens = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.tokens += int(batch.completion_mask.sum())
        self._update = self.clock.part("training")
        self._update.__enter__()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        self._update.__exit__(None, None, None)
        if (index + 1) % trainer.accumulate_grad_batches == 0:
            self.clock.step_done(self.tokens)
            self.tokens = 0


def run(job: Job) -> dict[str, Any]:
    """Train for a few steps, and return the clock's figures."""
    clock, folder = Clock(job), model_folder(job.model)
    objective = OBJECTIVES[job.work]()
    module = TimedModule(
        student=folder,
        objective=objective,
        teacher=LocalTeacher(folder) if objective.needs_teacher else None,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0, fused=True),
        activation_checkpointing=job.checkpointing,
    )
    module.clock = clock
    given = None
    if job.fixed:
        tokenizer, count = module.tokenizer, job.prompts * job.group
        given = given_completions(job, len(tokenizer), tokenizer.eos_token_id, count)

    def reward(sample: Sample) -> float:
        return reward_of(sample.text, sample.row["answer"])

    data = RolloutDataModule(
        train_prompts=prompts(job, job.prompts * (job.steps + 1)),
        reward=reward,
        rollout_engine=TimedEngine(clock, given),
        rollout=RolloutSettings(
            prompts_per_rollout=job.prompts, group_size=job.group, max_tokens=job.tokens
        ),
        seed=job.seed,
    )
    trainer = pl.Trainer(
        max_steps=job.steps + 1,
        accumulate_grad_batches=job.prompts * job.group // job.micro,
        gradient_clip_val=1.0,
        precision="32-true" if job.precision == "32" else "bf16-mixed",
        accelerator="cpu",
        # `Steps` comes before the statistics, so their cost counts for the next step.
        callbacks=[Steps(clock), SelectiveImitationStats()],
        default_root_dir=tempfile.mkdtemp(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return clock.result()
