"""Runs named cases on every rank; rank 0 writes their results (see ``strategy_runs.py``).

``python driver.py FOLDER STRATEGY CASE...`` runs alone or under ``torch.distributed.run``, once for
all cases. ``FOLDER`` holds the models.
"""

from __future__ import annotations

import sqlite3
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from helpers.processes.strategy_family import run_family
from helpers.processes.strategy_prompted import run_prompted
from kdrl_lightning import (
    GKD,
    KDRL,
    RLAD,
    AdapterOffTeacher,
    CachedTeacher,
    KDRLModule,
    LocalTeacher,
    LoRA,
    RolloutDataModule,
    RolloutSettings,
    RoutedTeacher,
    SelfTeacher,
    TeacherCompletions,
    TrainingStopped,
    TransformersEngine,
)
from kdrl_lightning.callbacks import (
    FSDPCheckpoint,
    SelectiveImitationStats,
    WeightSyncCheck,
    imitation_stats,
)
from kdrl_lightning.engines.base import Completion
from kdrl_lightning.losses import logprobs
from kdrl_lightning.models.weights import full_tensor, plain_name
from kdrl_lightning.objectives import BehaviorRatio
from kdrl_lightning.prompts import PromptSource
from kdrl_lightning.rewards import Sample, Verdict
from kdrl_lightning.teachers import MovingAverage
from kdrl_lightning.tiny import ColumnAddition

SGD = partial(torch.optim.SGD, lr=0.05)
ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
ROLLOUT = RolloutSettings(
    prompts_per_rollout=8,
    group_size=4,
    max_tokens=16,
    minibatches_per_rollout=2,
    mask_truncated=True,
)


def reward(sample: Sample) -> Verdict:
    """Reward odd lengths: some groups vary, others do not; some ranks alone have some parts."""
    odd = float(len(sample.ids) % 2)
    return Verdict(odd, odd == 1, {"odd": odd, f"begins_with_{sample.row['prompt'][0]}": odd})


class TwoTeachers(PromptSource):
    """Rows whose teacher changes in blocks, so that a rank may need only one of them."""

    def __init__(self) -> None:
        self.rows = ColumnAddition(24, seed=3)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "teacher": "a" if index % 5 else "b"}


class Sick(KDRLModule):
    """A module whose second step has a NaN gradient, from the last rank alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        if (
            self.trainer.global_step == 1
            and self.trainer.global_rank + 1 == self.trainer.world_size
        ):
            out["loss"] = out["loss"] * torch.nan
        return out


def forget_half(database: Path) -> None:
    """Drop every other stored score, so that a rank has to compute what another one finds."""
    if dist.get_rank() == 0:
        with sqlite3.connect(database) as connection:
            connection.execute("DELETE FROM scores WHERE rowid % 2")
    dist.barrier()


def on_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def failing(sample: Sample) -> float:
    """Fail on the last rank alone, except on the texts of the check before the run."""
    if on_last_rank() and sample.text not in ("", sample.row["prompt"]):
        raise ZeroDivisionError
    return 1.0


class OtherPolicy(TransformersEngine):
    """An engine whose log-probabilities are another policy's, on the last rank alone."""

    def generate(self, *args: Any) -> list[list[Completion]]:
        groups = super().generate(*args)
        gap = 5.0 * on_last_rank()
        return [
            [replace(c, logprobs=[value - gap for value in c.logprobs]) for c in group]
            for group in groups
        ]


class Choosy(LocalTeacher):
    """A teacher that does not know all tokens, on the last rank alone."""

    def accept(self, batch: Any) -> None:
        if on_last_rank():
            raise TrainingStopped("sampled tokens must be among the teacher's")


class Record(pl.Callback):
    """Keeps the values that tests compare; gradients and weights unsharded."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = {
            k: [] for k in ("completions", "masked", "flat", "logged", "gradients")
        }

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, _: int) -> None:
        if not batch.metrics:
            return
        plan = trainer.datamodule.rollouts.plan
        rows = plan.batch
        for row in range(len(rows)):
            length = int(rows.lengths[row])
            ids, value = rows.input_ids[row, :length].tolist(), float(rows.rewards[row])
            self.seen["completions"].append((trainer.global_step, ids, value))
        parts = [part for update in plan.updates for part in update]
        self.seen["masked"].append([not rows.select(p).loss_mask.any().item() for p in parts])
        by_group = [rows.rewards[rows.group_ids == g] for g in rows.group_ids.unique()]
        self.seen["flat"].append(sum(float(g.max()) == float(g.min()) for g in by_group))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen["gradients"].append(
            {
                plain_name(name): full_tensor(p.grad).clone()
                for name, p in pl_module.student.named_parameters()
                if p.grad is not None
            }
        )

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        row = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.seen["logged"].append(row)


def build(case: str, folder: Path, out: Path) -> tuple[KDRLModule, dict[str, Any], dict[str, Any]]:
    """Return module, data settings and trainer settings of a case."""
    dtype = "float32" if case == "kdrl32" else "float64"
    student, teacher = str(folder / "student"), LocalTeacher(str(folder / "teacher"), dtype)
    data: dict[str, Any] = {}
    trainer: dict[str, Any] = {"precision": "32-true" if case == "kdrl32" else "64-true"}
    make: Any = partial(KDRLModule, student, optimizer=SGD)
    if case in ("kdrl", "kdrl32", "sick"):
        make = partial(Sick, student, optimizer=SGD) if case == "sick" else make
        module = make(KDRL(teacher_kl_coef=0.5, ref_kl_coef=0.1), teacher)
    elif case == "rlad":
        module = make(RLAD(), teacher, optimizer=ADAMW)
        trainer["gradient_clip_val"] = 0.05
    elif case == "gkd":
        # A divergence over the full vocabulary calls the teacher's head outside its forward pass.
        module = make(GKD(jsd_beta=0.3), teacher, activation_checkpointing=True)
        data["teacher_completions"] = TeacherCompletions(1)
    elif case in ("routed", "half"):
        if case == "half":
            forget_half(out / "scores.db")
        cached = CachedTeacher(
            LocalTeacher(str(folder / "other"), dtype, offload=True), str(out / "scores.db")
        )
        module = make(KDRL(teacher_kl_coef=0.5), RoutedTeacher({"a": teacher, "b": cached}))
        data["train_prompts"] = TwoTeachers()
    elif case == "bf16":
        module = make(KDRL(teacher_kl_coef=0.5, kl_estimator="full_vocabulary"), teacher)
        trainer["precision"] = "bf16-mixed"
    elif case in ("lora", "lora_resumed", "lora_bf16"):
        objective = KDRL(0.5, kl_estimator="full_vocabulary", ref_kl_coef=0.1)
        lora = LoRA(3, 8.0, ["q_proj", "v_proj", "dense", "fc1"])  # an odd rank
        module = make(
            objective,
            AdapterOffTeacher(),
            optimizer=ADAMW,
            activation_checkpointing=True,
            lora=lora,
        )
        if case == "lora_bf16":
            trainer["precision"] = "bf16-mixed"
    elif case in ("average", "average_resumed"):
        module = make(KDRL(0.5), SelfTeacher(MovingAverage(0.3)), optimizer=ADAMW)
    elif case == "mixed":
        cached = CachedTeacher(teacher, str(out / "mixed.db"))
        objective = KDRL(0.5, kl_estimator="full_vocabulary", teacher_tokens=BehaviorRatio())
        module = make(objective, cached)
        data["teacher_completions"] = TeacherCompletions(2)
        data["rollout"] = replace(ROLLOUT, max_refills=1)
    elif case == "failing":
        module = make(RLAD(), teacher)
        data |= {"reward": failing, "val_prompts": None}
    elif case == "stale":
        module = make(RLAD(), teacher)
        data["rollout_engine"] = OtherPolicy()
    elif case == "choosy":
        module = make(RLAD(), Choosy(str(folder / "teacher"), dtype))
    else:
        raise ValueError(case)
    return module, data, trainer


def run(case: str, folder: Path, out: Path, strategy: str) -> dict[str, Any]:
    """Train a few steps and return what ``Record`` has kept, of all ranks."""
    module, data, settings = build(case, folder, out)
    record = Record()
    checkpoints = out / f"{case.removesuffix('_resumed')}_checkpoints"
    saver = FSDPCheckpoint(str(checkpoints), monitor=None, keep_last=9)
    saves = case in ("lora", "average")
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices="auto" if strategy == "auto" else 2,
        accumulate_grad_batches=2,
        max_steps=4,
        logger=False,
        enable_checkpointing=saves,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=-1,
        inference_mode=False,
        callbacks=[
            record,
            SelectiveImitationStats(),
            WeightSyncCheck(),
            *([saver] if saves else []),
        ],
        default_root_dir=out,
        **settings,
    )
    datamodule = RolloutDataModule(
        **{
            "train_prompts": ColumnAddition(24, seed=1),
            "val_prompts": ColumnAddition(5, seed=2),
            "reward": reward,
            "rollout": ROLLOUT,
            **data,
        }
    )
    if case in ("stale", "choosy", "failing"):
        reason = ""
        try:
            trainer.fit(module, datamodule=datamodule)
        except TrainingStopped as stop:
            reason = str(stop)
        reasons: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        return {"reasons": reasons}
    start = checkpoints / "step=00000002.ckpt" if case.endswith("_resumed") else None
    trainer.fit(module, datamodule=datamodule, ckpt_path=start)
    module.export(str(out / case))
    weights = {name: tensor.clone() for name, tensor in module.weights().named_tensors()}
    kept = module.self_teachers or torch.nn.ModuleList()
    own: dict[str, Any] = {k: record.seen.pop(k) for k in ("completions", "masked", "flat")}
    if isinstance(module.teacher, RoutedTeacher):
        cached = module.teacher.teachers["b"]
        own["found"] = (cached.hits, cached.misses)
    ranks: list[Any] = [own]
    if trainer.world_size > 1:
        ranks = [None] * trainer.world_size
        dist.all_gather_object(ranks, own)
    return {
        **record.seen,
        "ranks": ranks,
        "weights": weights,
        "kept": {name: full_tensor(p.detach()).clone() for name, p in kept.named_parameters()},
        "skipped": module.skipped_steps,
        "bytes": sum(
            getattr(p, "_local_tensor", p).untyped_storage().nbytes()
            for p in module.student.parameters()
        ),
        "imitation": trainer.callbacks[1].rows,
    }


def main() -> None:
    """Run the cases one after the other."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    imitation_stats.plot_imitation = lambda *_: None  # pictures are tested elsewhere
    folder, strategy, *cases = sys.argv[1:]
    if strategy != "auto":
        # One process recomputes logits; several compute gradients in the forward pass, in chunks.
        logprobs.PAYS_FROM["cpu"], logprobs.MAX_CHUNK = 0.0, 16
    out = Path(folder) / strategy
    out.mkdir(exist_ok=True)
    for case in cases:
        arguments = Path(folder), out, strategy
        several = {"family": run_family, "prompted": run_prompted}.get(case)
        seen = several(*arguments) if several else run(case, *arguments)
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(seen, out / f"{case}.pt")
            print(case, "done", flush=True)


if __name__ == "__main__":
    main()
