"""Short runs on random models: the pieces that tests of whole runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from kdrl_lightning import (
    GRPO,
    RLAD,
    EvaluationSettings,
    KDRLModule,
    LocalTeacher,
    LoRA,
    RewardFailures,
    RolloutDataModule,
    RolloutSettings,
    TeacherCompletions,
)
from kdrl_lightning.callbacks import FSDPCheckpoint, RunReport
from kdrl_lightning.cli.settings.renamed import RENAMED
from kdrl_lightning.objectives import Objective
from kdrl_lightning.rewards import Sample
from kdrl_lightning.rollout.prompt_order import Slots
from kdrl_lightning.teachers import Teacher
from kdrl_lightning.tiny import ColumnAddition


def some_reward(sample: Sample) -> float:
    """Return a reward that varies over the completions of a random model."""
    return float(len(sample.ids) % 2)


def make_module(
    student: str,
    teacher: str | Teacher | None,
    objective: Objective | None = None,
    dtype: str = "auto",
    lora: LoRA | None = None,
) -> KDRLModule:
    return KDRLModule(
        student=student,
        teacher=LocalTeacher(teacher, dtype) if isinstance(teacher, str) else teacher,
        objective=objective or RLAD(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
        lora=lora,
    )


def make_data(**changes: Any) -> RolloutDataModule:
    settings: dict[str, Any] = {
        "train_prompts": ColumnAddition(64, seed=1),
        "val_prompts": ColumnAddition(10, seed=2),
        "reward": some_reward,
        "prompts_per_rollout": 4,
        "group_size": 4,
        "max_tokens": 10,
        "minibatches_per_rollout": 2,
        "rollouts_per_epoch": 2,
    }
    return RolloutDataModule(**grouped({**settings, **changes}))


GROUPS: dict[str, Any] = {
    "rollout": RolloutSettings,
    "teacher_completions": TeacherCompletions,
    "evaluation": EvaluationSettings,
    "reward_failures": RewardFailures,
}


def grouped(flat: dict[str, Any]) -> dict[str, Any]:
    """Return a data module's arguments from flat settings: ``group_size`` goes into ``rollout``.

    The table of renamed settings says which group a setting is in.
    """
    out: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        if f"data.{name}" in RENAMED:
            _, group, inner = RENAMED[f"data.{name}"].split(".")
            groups.setdefault(group, {})[inner] = value
        elif name in RolloutSettings.__dataclass_fields__:  # never had a flat name
            groups.setdefault("rollout", {})[name] = value
        else:
            out[name] = value
    return out | {group: GROUPS[group](**values) for group, values in groups.items()}


def make_slots(count: int, minibatches: int, max_refills: int, seed: int) -> Slots:
    settings = RolloutSettings(
        prompts_per_rollout=count, minibatches_per_rollout=minibatches, max_refills=max_refills
    )
    return Slots(settings, seed)


def make_trainer(tmp_path: Path, **changes: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "max_steps": 8,
        "default_root_dir": tmp_path,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "inference_mode": False,
    }
    return pl.Trainer(**{**settings, **changes})


class Trace(pl.Callback):
    """Keeps every micro-batch, with all scores that its update used, and its optimizer step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any]] = []
        self.coefs: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append((trainer.global_step, batch))
        distill = getattr(pl_module.objective, "distill", None)
        self.coefs.append(0.0 if distill is None else distill.teacher_kl_coef)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
        step, batch = self.seen[-1]
        self.seen[-1] = step, pl_module.completed(batch)


def fit(
    tmp_path: Path,
    module: KDRLModule,
    data: RolloutDataModule,
    callbacks: list[pl.Callback] | None = None,
    **trainer: Any,
) -> Trace:
    trace = Trace()
    make_trainer(tmp_path, callbacks=[trace, *(callbacks or [])], **trainer).fit(
        module, datamodule=data
    )
    return trace


class Log(pl.Callback):
    """Keeps the logged metrics of each optimizer step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def trained(root: Path, student: str, lora: LoRA | None = None) -> tuple[Any, str]:
    """Train two steps; return the module and the checkpoint's path."""
    saver = FSDPCheckpoint(monitor=None)
    module = make_module(student, None, GRPO(), lora=lora)
    callbacks = [RunReport(evaluate_teacher=False), saver]
    trainer = make_trainer(root, max_steps=2, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, datamodule=make_data(val_prompts=None))
    return module, saver.last_model_path


class ScoredBefore(RLAD):
    """RLAD that always has old log-probs computed before the updates."""

    def reads_old_scores(self, rollout: Any) -> bool:
        return True
