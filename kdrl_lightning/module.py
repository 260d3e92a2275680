"""The LightningModule: student, frozen teacher, objective and optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from kdrl_lightning.checkpoints.module_state import (
    check_checkpoint,
    export_student,
    load_state,
    save_state,
)
from kdrl_lightning.checkpoints.reader import content_mark
from kdrl_lightning.checkpoints.resume import Settings, agree_before_loading
from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import require_count
from kdrl_lightning.evaluation.steps import EvaluationSteps
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.metrics import StepLog
from kdrl_lightning.metrics.nonfinite import NonFiniteSteps
from kdrl_lightning.metrics.update_stats import UpdateStats
from kdrl_lightning.models.architectures.trunk import Trunk
from kdrl_lightning.models.loading import ModelSource
from kdrl_lightning.models.lora import LoRA
from kdrl_lightning.models.pretrained import Pretrained, StudentFacts
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import load_scorer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.objectives.base import Objective, known
from kdrl_lightning.rollout_batch import RolloutBatch, upload
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.frozen import (
    FrozenModels,
    check_given,
    fields_found,
    initial_student,
    old_fields,
)
from kdrl_lightning.teachers.self_teachers import SelfTeacherSteps
from kdrl_lightning.trainer.checks.devices import check_fast_paths, check_memory
from kdrl_lightning.trainer.checks.limits import check_limits
from kdrl_lightning.trainer.internals import before_load
from kdrl_lightning.trainer.optimizers import (
    ZeroRateWarning,
    build_optimizer,
    check_length,
    check_moments,
    check_precision,
    clip_gradients,
    for_lightning,
    state_names,
)
from kdrl_lightning.trainer.strategies import check_unreached, refuse_fsdp1, sharding_of


class KDRLModule(EvaluationSteps, SelfTeacherSteps, StudentFacts, pl.LightningModule):
    """Trains a student on rollouts, with a frozen teacher if the objective needs one.

    The teacher is not a submodule, so optimizers, gradient buckets and checkpoints hold only the
    student. The exception is a self-teacher whose weights follow the student's, e.g. as a moving
    average: checkpoints hold these, too.

    Args:
        student: Hugging Face folder, hub name, or model source of the student.
        objective: the loss, e.g. ``KDRL`` or ``RLAD``.
        teacher: the frozen teacher; None for objectives without one.
        optimizer: any torch optimizer over the student's parameters.
        lr_scheduler: any torch schedule that needs no metric, stepped once per optimizer step
            (``LinearLR`` warms up, ``OneCycleLR`` with ``cycle_momentum: false`` also decays).
        max_nonfinite_steps: consecutive optimizer steps with a NaN or infinite loss or gradient
            that the run skips and counts; one more stops the run.
        activation_checkpointing: keep only the inputs of the student's layers for the backward
            pass, and recompute the rest. This saves memory and takes a third more time.
        lora: train low-rank adapters in the student's linear layers instead of all its weights.
        chunk_size: tokens whose logits student and reference compute at once; None: as many as
            fit into 64 MiB, at most 1024; on CUDA as many as fit into 1 GiB.
        attn_implementation: attention kernel of student and reference, by its name in transformers
            (``sdpa``, ``eager``, ``flash_attention_2``, ...); None: transformers' choice, usually
            ``sdpa``, which uses a flash kernel on a GPU because rows need no mask.
        compile: run the layers of student and reference through ``torch.compile``; if it fails, a
            warning says why, and they run without it.
        reference: model of the reference KL and of G-OPD; None: the student before training.

    Attributes:
        frozen: the teacher and the reference of the run.
        nonfinite: counts the optimizer steps that were skipped.
    """

    def __init__(
        self,
        student: str | ModelSource,
        objective: Objective,
        teacher: Teacher | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_nonfinite_steps: int = 3,
        activation_checkpointing: bool = False,
        lora: LoRA | None = None,
        chunk_size: int | None = None,
        attn_implementation: str | None = None,
        compile: bool = False,
        reference: Teacher | None = None,
    ) -> None:
        super().__init__()
        if chunk_size is not None:
            require_count("chunk_size", chunk_size, 1, float("inf"))
        check_given(teacher, objective, lora is not None)
        self.student_source = student
        self.pretrained = Pretrained(student)
        self.objective = objective
        self.teacher = teacher
        self.frozen = FrozenModels(teacher, reference)
        self.optimizer_callable = optimizer
        self.lr_scheduler_callable = lr_scheduler
        self.nonfinite = NonFiniteSteps(max_nonfinite_steps)
        self.activation_checkpointing = activation_checkpointing
        self.lora = lora
        # A checkpoint holds the adapters; the base comes from its folder.
        self.strict_loading = lora is None
        self.chunk_size = chunk_size
        self.trunk = Trunk(attn_implementation, compile)
        self.student: Scorer | None = None
        self._zero_rate = ZeroRateWarning()
        self._settings: Settings | None = None
        self._found: dict[str, Tensor | None] = {}
        self._stats = UpdateStats()
        self._base_digest: str | None = None
        self._step_log = StepLog()

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far because loss or gradient was not finite."""
        return self.nonfinite.skipped

    @property
    def teacher_seconds(self) -> float:
        """Seconds that the teacher has taken to score."""
        return self.frozen.seconds

    def prepare_data(self) -> None:
        """Create the models of model sources, on one process."""
        _ = self.student_path
        self.frozen.prepare()

    def setup(self, stage: str) -> None:
        """Check everything that needs no weights, and reset the state of an earlier run."""
        fitting = stage == "fit"
        self._stats = UpdateStats()
        self._step_log.reset()
        refuse_fsdp1(self.trainer.strategy)
        agree_before_loading(self.trainer, content_mark)
        before_load(self.trainer.strategy, partial(check_checkpoint, module=self, fitting=fitting))
        if fitting:
            check_limits(self.trainer)
            check_precision(self.trainer.precision)
            ranks = 1 if sharding_of(self.trainer) is None else self.trainer.world_size
            device = self.trainer.strategy.root_device
            check_memory(self.student_path, device, ranks, self.lora is not None)
        reference = None
        if fitting and self.objective.needs_reference:
            double, adapters = self.trainer.precision == "64-true", self.lora is not None
            reference = initial_student(
                self.student_source, adapters, double, self.chunk_size, self.trunk
            )
        self.frozen.choose(fitting, reference)
        self.trunk.check_device(self.trainer.strategy.root_device)
        self.frozen.check_device(self.trainer.strategy.root_device)
        self.frozen.check(self.tokenizer, self.student_path, self.objective)

    def configure_model(self) -> None:
        """Load the student and, for training, the frozen models; shard them under fsdp2."""
        sharding = sharding_of(self._trainer)
        if self.student is None:
            self.student = load_scorer(
                self.student_path,
                torch.get_default_dtype(),
                sharding,
                activation_checkpointing=self.activation_checkpointing,
                lora=self.lora,
                seed=getattr(getattr(self._trainer, "datamodule", None), "seed", 0),
                chunk_size=self.chunk_size,
                trunk=self.trunk,
            )
            if self._trainer is not None:
                check_unreached(self.trainer.strategy, self.student.unreached)
        elif sharding is not None and not self.student.sharded:
            sharding.shard(self.student)
        self.frozen.load(self.student, self.student_path, sharding, self.device)
        self.keep_self_teachers()

    def on_fit_start(self) -> None:
        """Move the frozen models to the student's device, and check kernels there."""
        self.frozen.move(self.device)
        student = self._student(), self.trunk, self.student_path
        check_fast_paths(self.trainer, student, self.frozen, self.reduce)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its schedule, built from their callables."""
        parameters = list(self._student().parameters())
        optimizer, scheduler = build_optimizer(
            parameters, self.optimizer_callable, self.lr_scheduler_callable
        )
        check_length(scheduler, self.trainer.max_steps)
        if sharding_of(self.trainer) is None:  # fsdp2 may load parameters without moments
            names = state_names(self.optimizer_callable)
            optimizer.register_load_state_dict_pre_hook(partial(check_moments, names))
        self._settings = Settings(optimizer, scheduler)
        return for_lightning(optimizer, scheduler)

    def on_train_start(self) -> None:
        """Apply the configured optimizer settings over the checkpoint's; restore the log."""
        if self.trainer.global_step and self._settings is not None:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)  # Lightning also allows a list
            self._settings.reapply(optimizer, self.lr_schedulers(), self.trainer.global_step)
        self._step_log.resume(self.trainer)

    # `Any` below: Lightning's type of checkpoints.
    def on_save_checkpoint(self, checkpoint: State) -> None:
        """Add the run's identity and the module's counters to a checkpoint."""
        save_state(checkpoint, self, sharding_of(self.trainer) is not None)

    def on_load_checkpoint(self, checkpoint: State) -> None:
        """Restore the counters."""
        load_state(checkpoint, self)

    @torch.no_grad()
    def score(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the student's scores, computed in the trainer's precision."""
        with self.trainer.precision_plugin.forward_context():
            top_k = self.objective.top_k or int(self.teacher is not None)
            scores = self._student().score(batch, top_k=top_k)
        return batch.replace(**old_fields(scores))

    @torch.no_grad()
    def score_reference(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the reference's scores, if the objective needs them."""
        with self.trainer.precision_plugin.forward_context():
            return self.frozen.score_reference(batch)

    @torch.no_grad()
    def score_teacher(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the teacher's scores, if there is a teacher."""
        with self.trainer.precision_plugin.forward_context():
            asked = self.objective.compared_ids(batch)
            return self.frozen.score_teacher(batch, asked, self.objective.teacher_top_k)

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the fields that the objective sets once per rollout."""
        return self.objective.prepare(batch)

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return this micro-batch's share of the step's loss, scaled to undo Lightning's averaging.

        Raises:
            TrainingStopped: on all ranks, if the teacher's log-probabilities are not finite on one.
        """
        # 1. Run the teacher, if the objective compares whole distributions.
        states = None if self.objective.divergence is None else self.frozen.states(batch)
        # 2. Run the student.
        scores = self._forward(batch, states)
        # 3. Fill the scores that the batch lacks from these passes.
        self._found = fields_found(scores)
        batch = self.completed(batch)
        # 4. Compute the loss.
        loss, terms = self.objective(batch, scores)
        # 5. Add to the statistics; log them at the step's last micro-batch.
        entropy = known(scores.entropy, "entropy").detach()
        self._stats.add(batch, entropy, loss, terms)
        if self._ends_step(batch_idx):
            self.log_step(self._stats.finish(self.reduce))
        self.log_step(batch.metrics)
        # 6. Undo Lightning's averaging.
        return {
            "loss": loss * self._averaging(),
            "logprobs": scores.logprobs.detach(),
            "entropy": entropy,
            **({} if scores.topk_ids is None else {"top_ids": scores.topk_ids[..., 0]}),
        }

    def completed(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the micro-batch of the latest ``training_step`` with all scores that it used.

        Callbacks may call it from ``on_before_backward`` on. A field that the update's forward pass
        computes is None in the batch that they get.
        """
        return batch.completed(self._found)

    def _forward(self, batch: RolloutBatch, states: Other | None) -> TokenScores:
        """Run the student with gradient; with a teacher, also return the student's top tokens."""
        top_k, divergence = int(self.teacher is not None), self.objective.divergence

        def loss(scores: TokenScores) -> Tensor:
            return self.objective(batch.completed(fields_found(scores)), scores)[0]

        coupled = self.objective.couples_tokens or batch.chunk_places is not None
        asked, ahead = self.objective.compared_ids(batch), None if coupled else loss
        return self._student().score(batch, top_k, asked, states, divergence, ahead)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip and count a step with a non-finite loss or gradient; stop after too many."""
        self._zero_rate.check(optimizer, self.trainer.global_step)
        parameters = list(self._student().parameters())
        norm = self.nonfinite.check(parameters, self._stats.loss, self.trainer.global_step)
        skipped = float(self.nonfinite.skipped)
        self.log_step({"policy/grad_norm": norm, "policy/skipped_steps": skipped})

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients, also those of a fused optimizer."""
        plugin = self.trainer.precision_plugin
        clip_gradients(plugin, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def log_step(self, values: Mapping[str, float | None]) -> None:
        """Log values of this optimizer step, which must be equal on all ranks.

        Later rows of the log repeat a value until it is logged again or the rollout ends. None
        leaves the field empty.
        """
        self._step_log.add(self.trainer, values)

    @property
    def logged_names(self) -> Collection[str]:
        """Names that ``log_step`` got so far, with or without a value."""
        return self._step_log.names

    def log_state(self) -> State:
        """Return the state from which a resumed run continues the log."""
        return {
            "step_log": self._step_log.state_dict(self.trainer),
            "step_stats": self._stats.state_dict(),
        }

    def load_log_state(self, saved: State) -> None:
        """Restore the state of the log, which older checkpoints lack."""
        self._step_log.load_state_dict(saved.get("step_log", {}))
        self._stats.load_state_dict(saved.get("step_stats", ()))

    def write_step(self) -> None:
        """Hand the numbers of the finished step to the loggers, once.

        A callback that ends or saves the run calls it first, so that a saved step is also logged.
        """
        self._step_log.write_once(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: RolloutBatch, batch_idx: int) -> None:
        """Hand a step's numbers, including those of callbacks, to the loggers."""
        if self._ends_step(batch_idx):
            self._step_log.end_step(self.trainer)

    def base_digest(self) -> str:
        """Return a checksum of a LoRA student's base model; all ranks must call it."""
        if self._base_digest is None:  # computed once: the base is frozen
            self._base_digest = self.weights().base_digest()
        return self._base_digest

    def weights(self) -> ModelWeights:
        """Return the student's live weights, for a sampling engine."""
        return ModelWeights(self._student().model, self.student_path)

    def export(self, path: str) -> None:
        """Write the student and its tokenizer as a Hugging Face folder; all ranks must call it.

        The new student replaces an earlier one in the folder only when it is complete.

        Raises:
            TrainingStopped: on every rank, if the first one cannot write.
        """
        export_student(self, self._trainer, path)

    def reduce(self, value: Tensor, operation: str) -> Tensor:
        """Return a tensor reduced over ranks by ``sum`` or ``max``."""
        reduced = self.trainer.strategy.reduce(upload(value, self.device), reduce_op=operation)
        assert isinstance(reduced, Tensor)
        return reduced

    def _ends_step(self, batch_idx: int) -> bool:
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    def _averaging(self) -> float:
        # Lightning divides by the accumulation, and data-parallel strategies average gradients over
        # ranks, but our loss weights are already global. Only this line undoes both.
        return float(self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def _student(self) -> Scorer:
        if self.student is None:
            raise RuntimeError("the student is not loaded: call configure_model() first")
        return self.student
