"""Writes a run's summary, curves and trained student, and prints a table at the end."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from kdrl_lightning.callbacks.base import RolloutCallback, StepOutputs, updates_per_rollout
from kdrl_lightning.callbacks.reports.plots import plot_curves
from kdrl_lightning.callbacks.reports.summary import summary_table
from kdrl_lightning.callbacks.teacher_health import TeacherHealth
from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.common.untyped import State, Tree
from kdrl_lightning.errors import Interrupted
from kdrl_lightning.metrics.step_log import numbers
from kdrl_lightning.models.loading import check_saves
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.trainer.checks.limits import nothing_trained
from kdrl_lightning.trainer.checks.monitors import (
    check_logged,
    check_monitors,
    check_validated,
    warn_of_late_validation,
)
from kdrl_lightning.trainer.end_of_run import (
    check_space,
    save_student,
    student_bytes,
    write_or_warn,
)
from kdrl_lightning.trainer.protocols import (
    TrainedModule,
    callbacks_of,
    is_trial_run,
    rollout_data,
    student_of,
    trained,
)
from kdrl_lightning.trainer.run_folder import run_folder

CURVES = (
    "reward/correct_frac",
    "reward/mean",
    "kd/reverse_kl",
    "kd/reverse_kl_wrong",
    "kd/imitation_frac",
    "kd/dead_frac_pos",
    "kd/dead_frac_neg",
    "rollout/length_mean",
    "policy/entropy",
    "health/leak_frac",
    "health/repeat_frac",
)


class RunReport(RolloutCallback):
    """Measures the accuracy of student and teacher, and writes the run folder.

    The student is measured before and after training, the teacher before. The run folder is the
    logger's (or ``default_root_dir``); if another run uses it, ``run_folder`` makes a new one. The
    callback writes ``summary.json``, ``curves.png`` and ``student/``, the trained student as a
    Hugging Face folder. It writes the student even if something else fails.

    Put it after the callbacks that log the values it shows, e.g. ``SelectiveImitationStats``.

    Args:
        evaluate_teacher: measure the teacher on the validation prompts before training. For this,
            every rank gathers the whole of a sharded teacher: set False if that does not fit.
        export: write the student.
    """

    def __init__(self, evaluate_teacher: bool = True, export: bool = True) -> None:
        self.evaluate_teacher = evaluate_teacher
        self.export = export
        self.curves: list[dict[str, float]] = []
        self.accuracy: list[tuple[int, float]] = []
        self.teacher_accuracy: float | None = None
        self._latest: dict[str, float] = {}
        self._saved = self._checked = False
        self._first_step: int | None = None  # None: the training loop has not started
        self._train_seconds = self._batch_started = 0.0
        self._started = time.perf_counter()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the clock, and forget an earlier run."""
        self._started = time.perf_counter()
        if stage == "fit":
            self.curves, self.accuracy, self.teacher_accuracy = [], [], None
            self._latest = {}
            self._train_seconds = 0.0
            self._saved = False
            self._first_step = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reserve the run folder, and check now what could fail at the end."""
        module = trained(pl_module)
        run_folder(trainer)
        check_validated(trainer)
        if self.export and not is_trial_run(trainer):
            stop_together(lambda: self._try_export(trainer, module), module.reduce)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the teacher, and the student unless the sanity check just did.

        A resumed run has both values from its checkpoint.
        """
        module = trained(pl_module)
        self._checked, self._first_step = False, trainer.global_step
        warn_of_late_validation(trainer)
        if self.accuracy and trainer.ckpt_path:
            return
        weights = None if module.teacher is None else module.teacher.weights()
        if self.evaluate_teacher and weights is not None and self._can_evaluate(trainer):
            if trainer.is_global_zero:
                print("measuring the teacher on the validation prompts", flush=True)
            self.teacher_accuracy = _evaluate(trainer, weights, "teacher")
        self._measure_student(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the accuracy; the sanity check's counts if it covers the whole set."""
        if trainer.state.fn == TrainerFn.FITTING:
            check_monitors(trainer)
        value = trainer.callback_metrics.get("val/accuracy")
        whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
        if value is not None and whole:
            self._note(trainer.global_step, float(value))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Start the clock of an update."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._batch_started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: StepOutputs,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Stop the clock of an update."""
        self._train_seconds += time.perf_counter() - self._batch_started
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the latest values, for checkpoints: some are logged only at a rollout's start."""
        if not self._checked:
            self._checked = True
            check_logged(trainer, trained(pl_module).logged_names)
        self._latest |= numbers(trainer.callback_metrics, CURVES)

    def on_rollout_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: int
    ) -> None:
        """Add a point to the curves."""
        self.curves.append({"rollout": rollout + 1, **self._latest})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the student, unless the last validation just did."""
        self._measure_student(trainer, trained(pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write all files, and print the table; the progress bar is closed by now."""
        module = trained(pl_module)
        folder = run_folder(trainer)
        if self.export and not is_trial_run(trainer):
            save_student(trainer, module, folder / "student")  # a collective: all ranks
            self._saved = True
        summary = self._summary(trainer, module, folder)
        if not trainer.is_global_zero:
            return
        if is_trial_run(trainer):
            print("fast_dev_run: nothing is written")
            return
        accuracy = [(step / updates_per_rollout(trainer), value) for step, value in self.accuracy]
        text = json.dumps(summary, indent=2) + "\n"
        file = folder / "summary.json"
        write_or_warn(file, lambda: file.write_text(text))
        file = folder / "curves.png"
        write_or_warn(file, lambda: plot_curves(file, self.curves, accuracy, summary))
        print(summary_table(summary, folder))
        if self._first_step in (None, trainer.global_step):
            print(f"nothing was trained: {nothing_trained(trainer)}.", flush=True)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save the student if an error ends the run, but not if a signal does.

        Rank 0 saves alone, since the other ranks may not have failed. It cannot gather a student
        that is sharded over several ranks; for that, use the last checkpoint.
        """
        module = trained(pl_module)
        stopped = isinstance(exception, KeyboardInterrupt | Interrupted)
        wanted = self.export and trainer.state.fn == TrainerFn.FITTING and not is_trial_run(trainer)
        if stopped or not wanted or self._saved or not trainer.global_step:
            return
        sharded = module.student is None or module.weights().sharded
        if trainer.is_global_zero and not (sharded and trainer.world_size > 1):
            folder = run_folder(trainer) / "student"
            write_or_warn(folder, lambda: save_student(trainer, module, folder, alone=True))
            if folder.exists():
                print(f"the student of step {trainer.global_step} is in {folder}", flush=True)

    def state_dict(self) -> State:
        """Return the curves and the measured values."""
        return {
            "curves": self.curves,
            "latest": self._latest,
            "accuracy": self.accuracy,
            "teacher_accuracy": self.teacher_accuracy,
            "train_seconds": self._train_seconds,
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the curves and the measured values."""
        self.curves, self._latest = state_dict["curves"], state_dict["latest"]
        self.accuracy = [(int(step), float(value)) for step, value in state_dict["accuracy"]]
        self.teacher_accuracy = state_dict["teacher_accuracy"]
        self._train_seconds = state_dict["train_seconds"]

    def _try_export(self, trainer: pl.Trainer, pl_module: TrainedModule) -> None:
        if trainer.is_global_zero:
            check_space({run_folder(trainer): student_bytes(pl_module)})
            check_saves(pl_module.weights().model, pl_module.tokenizer)

    def _measure_student(self, trainer: pl.Trainer, pl_module: TrainedModule) -> None:
        noted = bool(self.accuracy) and self.accuracy[-1][0] == trainer.global_step
        if not noted and self._can_evaluate(trainer):
            value = _evaluate(trainer, pl_module.weights(), "student")
            if value is not None:
                self._note(trainer.global_step, value)

    def _can_evaluate(self, trainer: pl.Trainer) -> bool:
        wanted = trainer.limit_val_batches != 0
        data = rollout_data(trainer)
        return wanted and data is not None and data.val_prompts is not None

    def _note(self, step: int, value: float) -> None:
        if self.accuracy and self.accuracy[-1][0] == step:
            self.accuracy.pop()
        self.accuracy.append((step, value))

    def _summary(self, trainer: pl.Trainer, pl_module: TrainedModule, folder: Path) -> Tree:
        data = rollout_data(trainer)
        seconds = {} if data is None else data.watch.seconds
        rollout_seconds = seconds.get("time/rollout_s", 0.0) + seconds.get("time/sync_s", 0.0)
        tokens = 0 if data is None else data.watch.tokens
        watching = [c for c in callbacks_of(trainer) if isinstance(c, TeacherHealth)]
        measured = next((health.teacher_accuracy for health in watching), None)
        return {
            "method": type(pl_module.objective).__name__,
            "seed": getattr(getattr(trainer, "datamodule", None), "seed", None),
            "student": pl_module.student_path,
            "trainable_parameters": sum(
                p.numel() for p in student_of(pl_module).parameters() if p.requires_grad
            ),
            "student_accuracy_before": self.accuracy[0][1] if self.accuracy else None,
            "student_accuracy_after": self.accuracy[-1][1] if self.accuracy else None,
            "teacher_accuracy": self.teacher_accuracy if measured is None else measured,
            "warnings": {name: rollout for health in watching for rollout, name in health.events},
            "rollouts": -(-trainer.global_step // updates_per_rollout(trainer)),
            "optimizer_steps": trainer.global_step,
            "skipped_steps": pl_module.skipped_steps,
            "rollout_seconds": rollout_seconds,
            "score_seconds": seconds.get("time/score_s", 0.0),
            "train_seconds": self._train_seconds,
            "teacher_seconds": 0.0 if data is None else data.teacher_seconds,
            "wall_seconds": time.perf_counter() - self._started,
            "tokens_per_second": tokens / rollout_seconds if rollout_seconds else None,
            "export_path": str(folder / "student") if self.export else None,
            "torch": torch.__version__,
        }


def _evaluate(trainer: pl.Trainer, weights: ModelWeights, who: str) -> float | None:
    """Return a model's accuracy; None, with a warning, if we cannot sample from it."""
    data = rollout_data(trainer)
    assert data is not None  # see `_can_evaluate`
    reason = data.cannot_evaluate(weights)
    if not reason:
        return data.evaluate(weights)
    if trainer.is_global_zero:
        warnings.warn(
            f"the {who} is not measured on the first validation set: {reason}.", stacklevel=2
        )
    return None
