"""The LightningModule: student, frozen teacher, objective and optimizer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kdrl_lightning.checkpoints.integrity import whole_folder
from kdrl_lightning.checkpoints.reader import check_readable, content_mark, read_metadata
from kdrl_lightning.checkpoints.resume import (
    KEY,
    Settings,
    agree_before_loading,
    check_complete,
    check_identity,
    identity,
    number_by_place,
)
from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_between
from kdrl_lightning.evaluation import EvaluationBatch, EvaluationMetrics
from kdrl_lightning.losses import k3
from kdrl_lightning.losses.logprobs import LOGPROB_FLOOR, TokenScores
from kdrl_lightning.metrics import StepLog, StepStats
from kdrl_lightning.metrics.nonfinite import NonFiniteSteps
from kdrl_lightning.models.end_tokens import EndTokens, end_tokens
from kdrl_lightning.models.loading import (
    ModelSource,
    load_config,
    load_tokenizer,
    model_path,
)
from kdrl_lightning.models.lora import LoRA
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import load_scorer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.objectives.base import Objective, known
from kdrl_lightning.pending import fill, fill_teacher, with_room, with_teacher_room
from kdrl_lightning.rollout_batch import STUDENT, RolloutBatch
from kdrl_lightning.teachers.adapter_off import AdapterOffTeacher
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.local import LocalTeacher
from kdrl_lightning.teachers.tokenizers import check_end_tokens
from kdrl_lightning.trainer.failures import export_together
from kdrl_lightning.trainer.internals import before_load
from kdrl_lightning.trainer.strategies import check_unreached, refuse_fsdp1, sharding_of

# Sums over a step that are looked at and not logged.
BROKEN, WATCHED = "teacher/broken_tokens", "teacher/watched_tokens"


class KDRLModule(pl.LightningModule):
    """Trains a student on rollouts, with a frozen teacher beside it.

    The teacher is no submodule: parameters, optimizers, buckets and checkpoints hold the student
    only.

    Args:
        student: Hugging Face folder, hub name, or model source of the student.
        objective: the loss, e.g. ``KDRL`` or ``RLAD``.
        teacher: the frozen teacher, where the objective needs one.
        optimizer: any torch optimizer over the student's parameters.
        lr_scheduler: any torch schedule that needs no metric, stepped once per optimizer step
            (``LinearLR`` warms up, ``OneCycleLR`` with ``cycle_momentum: false`` also decays).
        max_nonfinite_steps: optimizer steps in a row whose loss or gradient may be NaN or infinite;
            each is skipped and counted, one more stops the run.
        activation_checkpointing: keep only the inputs of the student's layers for the backward
            pass, and recompute the rest: less memory for a third more time.
        lora: train low-rank adapters in the student's linear layers instead of all its weights.
        chunk_size: tokens whose logits exist at once, of student and reference; None takes as many
            as fit about 64 MiB, at most 1024.

    Attributes:
        teacher_seconds: time that the teacher took to score.
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
    ) -> None:
        super().__init__()
        if chunk_size is not None:
            require_between("chunk_size", chunk_size, 1, float("inf"))
        if objective.needs_teacher and teacher is None:
            raise ConfigurationError(
                f"`teacher` must be given for the objective {type(objective).__name__}: got None. "
                "Name one, e.g. `teacher: {class_path: LocalTeacher, init_args: {model: ...}}`."
            )
        if teacher is not None and teacher.needs_lora and lora is None:
            raise ConfigurationError(
                f"`teacher` must have a LoRA student to be its base: got {type(teacher).__name__} "
                "without `lora`. Set `lora: {rank: 16}`, or use a LocalTeacher."
            )
        self.student_source = student
        self.objective = objective
        self.teacher = teacher
        self.optimizer_callable = optimizer
        self.lr_scheduler_callable = lr_scheduler
        self.nonfinite = NonFiniteSteps(max_nonfinite_steps)
        self.activation_checkpointing = activation_checkpointing
        self.lora = lora
        # A checkpoint holds the adapters; the base comes from its folder.
        self.strict_loading = lora is None
        self.chunk_size = chunk_size
        self.student: Scorer | None = None
        self.teacher_seconds = 0.0
        self._warned_of_rate = False
        self._settings: Settings | None = None
        self._active_teacher = teacher
        self._reference: Teacher | None = None
        self._stats = StepStats()
        self._step_loss = 0.0
        self._base_digest: str | None = None
        self._tokenizer: Any = None
        self._end_tokens: EndTokens | None = None
        self.eval_metrics = EvaluationMetrics()
        self._step_log = StepLog()
        self._written = 0  # optimizer steps, with the last one that the loggers have

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far, for a loss or gradient that was not finite."""
        return self.nonfinite.skipped

    @property
    def student_path(self) -> str:
        """Folder or hub name of the student before training."""
        return model_path(self.student_source)

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.student_path)
        return self._tokenizer

    @property
    def end_tokens(self) -> EndTokens:
        """The tokens that end a completion of the student."""
        if self._end_tokens is None:
            self._end_tokens = end_tokens(self.student_path, self.tokenizer)
        return self._end_tokens

    @property
    def context_length(self) -> int:
        """Longest sequence, prompt and completion together, that the student can take."""
        config = load_config(self.student_path).get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the student's embedding: every token id must be below."""
        return int(load_config(self.student_path).get_text_config().vocab_size)

    def prepare_data(self) -> None:
        """Let model sources make their models, on one process."""
        model_path(self.student_source)
        if self.teacher is not None:
            self.teacher.prepare()

    def setup(self, stage: str) -> None:
        """Check what can be checked before weights are loaded; forget a run that was stopped."""
        self._stats = StepStats()
        self._step_log.forget()
        self._written = 0
        refuse_fsdp1(self.trainer.strategy)
        agree_before_loading(self.trainer, content_mark)
        before_load(self.trainer.strategy, lambda p: self._check_checkpoint(p, stage))
        if stage == "fit" and self.trainer.precision in ("bf16-true", "16-true", "16-mixed"):
            raise ConfigurationError(
                "`precision` must keep float32 weights, without a loss scaler, for training: got "
                f"{self.trainer.precision}. Use bf16-mixed or 32-true: in 16-bit weights an update "
                "of 1e-6 rounds away."
            )
        # Evaluation needs no teacher: do not load it for nothing.
        self._active_teacher = self.teacher if stage == "fit" else None
        wanted = stage == "fit" and self.objective.needs_reference
        self._reference = self._initial_student() if wanted else None
        teacher = self._active_teacher
        if self.objective.divergence is not None and teacher and not teacher.gives_states:
            raise ConfigurationError(
                "`teacher` must be a LocalTeacher for a divergence over the full vocabulary: got "
                f"{type(teacher).__name__}. Use one, or a sampled or top-k estimator."
            )
        for frozen in self._frozen():
            frozen.check(self.tokenizer, self.student_path)
            check_end_tokens(frozen.other_end, self.objective)

    def _check_checkpoint(self, path: str, stage: str) -> None:
        values = read_metadata(path)
        saved, held = values.get(KEY), values.get("state_dict")
        check_readable(path, self.trainer.strategy)
        if saved is not None:
            loaded = self.student and self.weights().model.config  # or its part for text
            config = loaded or load_config(self.student_path)
            check_identity(saved, self, config, stage == "fit", path)
        if self.lora is not None and held is not None:  # shards say so themselves
            check_complete(held.keys(), self.state_dict().keys(), path)

    def configure_model(self) -> None:
        """Load the student and, for training, the teacher, once; shard each where asked to."""
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
            )
            if self._trainer is not None:
                check_unreached(self.trainer.strategy, self.student.unreached)
        elif sharding is not None and not self.student.sharded:
            sharding.shard(self.student)
        for frozen in self._frozen():
            frozen.spread(sharding)
            frozen.look_at(self.student, self.student_path)
            frozen.load(self.device)

    def on_fit_start(self) -> None:
        """Move the frozen models to where the student is by now."""
        for frozen in self._frozen():
            frozen.load(self.device)

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule from their callables."""
        trainable = [p for p in self._student().parameters() if p.requires_grad]
        make = self.lr_scheduler_callable
        try:
            optimizer: Any = self.optimizer_callable(trainable)
            scheduler = None if make is None else make(optimizer)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"`optimizer` or `lr_scheduler`: {error}.") from error
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigurationError(
                "`lr_scheduler` must be a schedule by steps: got ReduceLROnPlateau, which "
                "waits for a metric. Take LinearLR or OneCycleLR, or the callback EarlyStopping."
            )
        self._settings = Settings(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Let the configuration win over a checkpoint's optimizer settings; restore the log."""
        if self.trainer.global_step and self._settings is not None:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            self._settings.reapply(optimizer, self.lr_schedulers(), self.trainer.global_step)
        self._step_log.resume(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add whose checkpoint it is, and what the module counts."""
        checkpoint[KEY] = {
            **identity(self),
            **self.nonfinite.state_dict(),
            "teacher_seconds": self.teacher_seconds,
            "step_log": {} if self._ends_rollout() else self._step_log.state_dict(),
            "step_stats": self._stats.state_dict(),
        }
        if sharding_of(self.trainer) is None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            for state in checkpoint.get("optimizer_states", []):
                number_by_place(state, optimizer, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        saved = checkpoint.get(KEY)
        if saved is not None:
            self.nonfinite.load_state_dict(saved)
            self.teacher_seconds = saved["teacher_seconds"]
            # Older checkpoints have neither.
            self._step_log.load_state_dict(saved.get("step_log", {}))
            self._stats.load_state_dict(saved.get("step_stats", ()))

    @torch.no_grad()
    def score(self, batch: RolloutBatch) -> RolloutBatch:
        """Add what the student says of completions, under the trainer's precision."""
        with self.trainer.precision_plugin.forward_context():
            top_k = self.objective.top_k or int(self.teacher is not None)
            scores = self._student().score(batch, top_k=top_k)
        return batch.replace(
            old_logprobs=scores.logprobs, old_entropy=scores.entropy, topk_ids=scores.topk_ids
        )

    def leave_room(self, batch: RolloutBatch) -> RolloutBatch:
        """Make room for the student's scores, which the coming update writes in."""
        return with_room(batch, self._student().scores_dtype, self.teacher is not None)

    def leave_teacher_room(self, batch: RolloutBatch) -> RolloutBatch:
        """Make room for the scores of a teacher that the updates run for a divergence."""
        return with_teacher_room(batch, self._student().scores_dtype)

    @property
    def joins_frozen(self) -> bool:
        """Whether teacher and reference may score several micro-batches at once."""
        return all(frozen.joins for frozen in self._frozen())

    @torch.no_grad()
    def score_frozen(self, batch: RolloutBatch) -> RolloutBatch:
        """Add what teacher and reference say, under the trainer's precision.

        A teacher's log-probabilities are floored at ``LOGPROB_FLOOR``; NaN stays, to be refused.
        """
        asked = batch.topk_ids if self.objective.top_k else None
        with self.trainer.precision_plugin.forward_context():
            if self._reference is not None:
                batch = batch.replace(ref_logprobs=self._reference.score(batch).logprobs)
            if self.teacher is None or batch.teacher_pending:
                return batch
            with self._teacher_clock():
                teacher = self.teacher.score(batch, asked)
        best = teacher.topk_ids
        return batch.replace(
            teacher_logprobs=teacher.logprobs.clamp(min=LOGPROB_FLOOR),
            teacher_entropy=teacher.entropy,
            teacher_top_ids=None if best is None else best[..., 0],
            teacher_topk_logprobs=teacher.topk_logprobs,
            teacher_tail_logprobs=teacher.tail_logprobs,
        )

    def _update_scores(self, batch: RolloutBatch) -> TokenScores:
        """Run the student with gradient, and what the objective compares it with."""
        divergence, other = self.objective.divergence, None
        if divergence is not None:
            assert self.teacher is not None
            with self._teacher_clock():
                other = self.teacher.states(batch)
                if batch.teacher_pending:
                    fill_teacher(batch, other, self._student().chunk_size)
            if batch.teacher_pending:
                self._watch_teacher(batch)
        asked = batch.topk_ids if self.objective.top_k else None
        top_k = int(batch.topk_ids is not None)
        scores = self._student().score(batch, top_k, asked, other, divergence)
        if batch.old_pending:
            fill(batch, scores)
            self._measure_mismatch(batch)
        return scores

    def _watch_teacher(self, batch: RolloutBatch) -> None:
        """Count what a teacher says in the update, as a rollout's source does what it said."""
        teacher, real = known(batch.teacher_logprobs, "teacher_logprobs"), batch.completion_mask
        self._stats.add_mean("kd/floored_frac", teacher <= LOGPROB_FLOOR, real)
        self._stats.add_sum(BROKEN, (~teacher.isfinite()).sum())
        self._stats.add_sum(WATCHED, real.sum())

    def _measure_mismatch(self, batch: RolloutBatch) -> None:
        if batch.rollout_logprobs is not None and batch.old_logprobs is not None:
            mismatch = k3(batch.rollout_logprobs.double(), batch.old_logprobs.double())
            own = batch.completion_mask & (batch.source == STUDENT)[:, None]
            self._stats.add_mean("rollout/mismatch_kl", mismatch, own)

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return this micro-batch's share of the step's loss, scaled against later averaging.

        Raises:
            TrainingStopped: on all ranks, if on one the teacher's log-probabilities are not finite.
        """
        scores = self._update_scores(batch)
        loss, terms = self.objective(batch, scores)
        entropy = known(scores.entropy, "entropy")
        self._stats.add_sum("loss/total", loss)
        for name, value in terms.items():
            self._stats.add_sum(f"loss/{name}", value)
        self._stats.add_mean("policy/entropy", entropy, batch.loss_mask)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            values = self._stats.compute(self.reduce)
            broken, watched = (values.pop(name, 0.0) for name in (BROKEN, WATCHED))
            if broken:
                raise TrainingStopped(
                    f"the teacher's log-probabilities must be finite: got {broken:.0f} NaN or "
                    f"infinite of {watched:.0f}. Check its weights and dtype."
                )
            self._step_loss = values["loss/total"]
            self.log_step(self._stats.with_gaps(values))
        self.log_step(batch.metrics)
        return {
            "loss": loss * self._averaging(),
            "logprobs": scores.logprobs.detach(),
            "entropy": entropy.detach(),
            **({} if scores.topk_ids is None else {"top_ids": scores.topk_ids[..., 0]}),
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip and count a step that is not finite; stop when that repeats."""
        rates = [group["lr"] for group in optimizer.param_groups]
        if self.trainer.global_step and not any(rates) and not self._warned_of_rate:
            self._warned_of_rate = True
            warnings.warn(
                f"the learning rate is 0 from step {self.trainer.global_step} on: `lr_scheduler` "
                "ends before the run. Give it as many steps as `max_steps`.",
                stacklevel=2,
            )
        parameters = list(self._student().parameters())
        norm = self.nonfinite.check(parameters, self._step_loss, self.trainer.global_step)
        skipped = float(self.nonfinite.skipped)
        self.log_step({"policy/grad_norm": float(norm), "policy/skipped_steps": skipped})

    def log_step(self, values: Mapping[str, float | None]) -> None:
        """Log numbers of this optimizer step, equal on all ranks, as ``log_dict`` does.

        A number stands in the rows of its rollout until it is logged again; None leaves a gap.
        """
        self._step_log.add(self.trainer, values)

    def write_step(self) -> None:
        """Hand the numbers of the finished step to the loggers, once.

        A callback that ends or saves the run calls it first: what is saved is also logged.
        """
        if self._written != self.trainer.global_step:
            self._written = self.trainer.global_step
            self._step_log.write(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: RolloutBatch, batch_idx: int) -> None:
        """Hand a step's numbers to the loggers, those of the callbacks, too."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        self.write_step()
        if self._ends_rollout():
            self._step_log.forget()  # the numbers of a rollout stand in each of its steps' rows

    def _ends_rollout(self) -> bool:
        """Whether the last optimizer step was a rollout's last."""
        data: Any = getattr(self.trainer, "datamodule", None)
        return int(self.trainer.global_step) % getattr(data, "updates_per_rollout", 1) == 0

    def validation_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count correct completions."""
        self.eval_metrics.add(batch, self.device)

    def test_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count correct completions."""
        self.eval_metrics.add(batch, self.device)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/*``."""
        self.log_dict(self.eval_metrics.take("val"), sync_dist=True)  # equal on all ranks already

    def on_test_epoch_end(self) -> None:
        """Log ``test/*``."""
        self.log_dict(self.eval_metrics.take("test"), sync_dist=True)  # equal on all ranks already

    def predict_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Return a row per completion, with its prompt's columns, reward and verdict."""
        return batch.predictions()

    def base_digest(self) -> str:
        """Return what tells a LoRA student's base model from another; all ranks must ask."""
        if self._base_digest is None:  # it is frozen
            self._base_digest = self.weights().base_digest()
        return self._base_digest

    def weights(self) -> ModelWeights:
        """Return the student's live weights, for a sampling engine."""
        return ModelWeights(self._student().model, self.student_path)

    def export(self, path: str) -> None:
        """Write the student and its tokenizer as a Hugging Face folder; all ranks must call it.

        The folder gets the new student as a whole; if it cannot be written, an earlier one stays.

        Raises:
            TrainingStopped: on every rank, if the first one cannot write.
        """
        writes = self._trainer is None or self.trainer.is_global_zero
        write = self.weights().writer(writes)

        def write_both() -> None:
            if not writes:
                return
            with whole_folder(Path(path)) as half:
                write(str(half))
                self.tokenizer.save_pretrained(half)

        if self._trainer is None:
            write_both()
        else:
            export_together(self.trainer, write_both, path)

    def reduce(self, value: Tensor, operation: str) -> Tensor:
        """Reduce a tensor over ranks; ``sum`` or ``max``."""
        reduced = self.trainer.strategy.reduce(value.to(self.device), reduce_op=operation)
        assert isinstance(reduced, Tensor)
        return reduced

    def _averaging(self) -> float:
        # The one place: Lightning divides by the accumulation, data-parallel strategies average
        # gradients over ranks, but our weights are already global.
        return float(self.trainer.accumulate_grad_batches * self.trainer.world_size)

    @contextmanager
    def _teacher_clock(self) -> Iterator[None]:
        """Add to ``teacher_seconds``."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.teacher_seconds += time.perf_counter() - started

    def _initial_student(self) -> Teacher:
        """For a reference KL: a view of a LoRA student, else one more frozen model."""
        if self.lora is not None:
            return AdapterOffTeacher()
        dtype = "float64" if self.trainer.precision == "64-true" else "float32"  # the student's
        return LocalTeacher(self.student_source, dtype, chunk_size=self.chunk_size)

    def _frozen(self) -> list[Teacher]:
        return [f for f in (self._active_teacher, self._reference) if f is not None]

    def _student(self) -> Scorer:
        if self.student is None:
            raise RuntimeError("the student is not loaded: call configure_model() first")
        return self.student
