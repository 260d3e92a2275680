"""Cases of the driver: one objective of each kind, two updates of one rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from kdrl_lightning import (
    CISPO,
    GKD,
    GRPO,
    GSPO,
    KDRL,
    RLAD,
    RLSD,
    SFT,
    SRPO,
    KDRLModule,
    LocalTeacher,
    OnPolicyDistillation,
    RolloutDataModule,
    RolloutSettings,
    SupervisedDataModule,
    TeacherCompletions,
)
from kdrl_lightning.objectives import (
    BehaviorRatio,
    Objective,
    PolicyObjective,
    ShapedProbability,
    SumAdvantage,
    SurrogateTerm,
    TokenRatio,
    TrustRegionRatio,
    WrongGroups,
)
from kdrl_lightning.rewards import Sample
from kdrl_lightning.tiny import AdditionTraces, ColumnAddition

OWN: dict[str, Callable[[], Objective]] = {
    "dr-grpo": lambda: GRPO(scale_by_std=False, reduction="constant_length", ref_kl_coef=0.1),
    "gspo": lambda: GSPO(reduction="sequence_mean"),
    "cispo": lambda: CISPO(entropy_coef=0.01),
    "distillation": lambda: OnPolicyDistillation(kl_estimator="top_k", kd_top_k=5),
    "kdrl-group": lambda: KDRL(
        0.5, selection=[WrongGroups()], reduction="group_token_mean", kd_per_imitated_token=True
    ),
    "kdrl-shaping": lambda: KDRL(0.5, form="reward_shaping"),
    "hdpo": lambda: PolicyObjective(TokenRatio(), SumAdvantage(0.5), selection=[WrongGroups()]),
    "srpo": SRPO,
    "rlsd": RLSD,
    "sum": lambda: GRPO(distill=SurrogateTerm(TrustRegionRatio(), 0.5), reduction="sequence_mean"),
}
MIXED: dict[str, Callable[[], Objective]] = {
    "luffy": lambda: GRPO(teacher_tokens=ShapedProbability()),
    "behavior": lambda: RLAD(teacher_tokens=BehaviorRatio()),
    "gkd-top-k": lambda: GKD(jsd_beta=0.3, top_k=5),
}
GIVEN: dict[str, Callable[[], Objective]] = {"sft-correct": partial(SFT, only_correct=True)}


def judge(sample: Sample) -> float:
    """Accept about a third of a random model's completions; a group may have none."""
    return float(len(sample.ids) % 3 == 1)


def cases() -> Iterator[tuple[str, Objective, pl.LightningDataModule]]:
    for objectives, group_size, theirs in ((OWN, 3, 0), (MIXED, 2, 1), (GIVEN, 0, 3)):
        for name, make in objectives.items():
            data = RolloutDataModule(
                ColumnAddition(24, seed=1),
                judge,
                rollout=RolloutSettings(
                    prompts_per_rollout=8,
                    group_size=group_size,
                    max_tokens=12,
                    minibatches_per_rollout=2,
                    mask_truncated=objectives is OWN,
                ),
                teacher_completions=TeacherCompletions(theirs),
            )
            yield name, make(), data
    yield "supervised", SFT(), SupervisedDataModule(AdditionTraces(40, seed=4), batch_size=8)


def two_steps(
    module: KDRLModule, data: pl.LightningDataModule, strategy: str, out: Path
) -> dict[str, Any]:
    """Train two optimizer steps of two micro-batches; return losses, weights and the context."""
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices="auto" if strategy == "auto" else 2,
        precision="64-true",
        accumulate_grad_batches=2,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        default_root_dir=out,
    )
    trainer.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "losses": {name: value for name, value in logged.items() if name.startswith("loss/")},
        "weights": {name: tensor.clone() for name, tensor in module.weights().named_tensors()},
        "context": logged.get("kd/context_frac"),
    }


def run_family(folder: Path, out: Path, strategy: str) -> dict[str, Any]:
    """Return losses and weights of each case."""
    seen: dict[str, Any] = {}
    for name, objective, data in cases():
        module = KDRLModule(
            str(folder / "student"),
            objective,
            LocalTeacher(str(folder / "teacher"), "float64"),
            partial(torch.optim.SGD, lr=0.05),
        )
        seen[name] = two_steps(module, data, strategy, out)
    return seen
