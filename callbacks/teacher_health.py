"""Warns if a self-teacher, or a teacher with its own prompt, harms the student."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor

from kdrl_lightning.callbacks.base import RolloutCallback
from kdrl_lightning.common.untyped import HFTokenizer, Row, State
from kdrl_lightning.errors import require_count
from kdrl_lightning.metrics.completion_texts import (
    HEDGES,
    REFERENCES,
    appeals,
    count_words,
    repeated_frac,
)
from kdrl_lightning.metrics.health_signs import SIGNS, falling_pass
from kdrl_lightning.metrics.step_log import numbers
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout.generation import Judged
from kdrl_lightning.rollout_batch import STUDENT
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.self_teachers import self_teachers
from kdrl_lightning.trainer.protocols import TrainedModule, rollout_data, trained

WATCHED = (
    "kd/reverse_kl",
    "kd/teacher_entropy",
    "policy/entropy",
    "rollout/length_mean",
    "reward/mean",
)
PASS = "pass_at_"


class RowPrompt(Protocol):
    """The part of a ``PromptedTeacher`` that writes its prompt for a row."""

    @property
    def context(self) -> Any:  # no type: only some contexts have `of_row`
        """The teacher's context; it has ``of_row`` if it depends on the row alone."""

    def ids(self, tokenizer: HFTokenizer, row: Row, context: str = "") -> list[int]:
        """Return the prompt's token ids."""


class TeacherHealth(RolloutCallback):
    """Warns of known failures of self-distillation, once each, and names a cure.

    Before training it measures the teacher's accuracy with its own prompt on validation prompts. If
    it is no better than the student's, the teacher has nothing to teach, and the callback warns. In
    each rollout it then logs ``health/leak_frac`` (share of the completions that mention a
    reference that their prompt does not contain), ``health/hedges_mean`` (words such as *wait* or
    *maybe* per completion) and ``health/repeat_frac`` (share of a completion's 8-token n-grams that
    repeat earlier ones). It watches these, ``kd/reverse_kl``, ``kd/teacher_entropy``,
    ``policy/entropy``, lengths, rewards and held-out pass@k. ``metrics/health_signs.py`` holds the
    signs of a failure and their limits; ``docs/methods/self_teachers.md`` says where they come
    from. ``RunReport`` marks the warnings in ``curves.png``.

    Args:
        window: number of rollouts over which to average the first and the latest values.
        prompts: number of validation prompts on which to measure the teacher; 0 skips this.
        phrases: phrases that refer to a solution or hint; None: a built-in list.
        hedges: hedging words; None: a built-in list.

    Attributes:
        rows: the watched numbers of each rollout.
        events: (rollout, name) of each warning.
        teacher_accuracy: the teacher's accuracy with its own prompt; None if not measured.
    """

    def __init__(
        self,
        window: int = 10,
        prompts: int = 64,
        phrases: list[str] | None = None,
        hedges: list[str] | None = None,
    ) -> None:
        require_count("window", window, 1, float("inf"))
        require_count("prompts", prompts, 0, float("inf"))
        self.window = window
        self.prompts = prompts
        self.phrases: Sequence[str] = REFERENCES if phrases is None else phrases
        self.hedges: Sequence[str] = HEDGES if hedges is None else hedges
        self._forget()

    def _forget(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.events: list[tuple[int, str]] = []
        self.teacher_accuracy: float | None = None
        self._texts: dict[str, float] = {}  # of the rollout in use

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        if stage == "fit":
            self._forget()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the accuracy of teacher and student, each with its prompt, unless resumed."""
        module, data = trained(pl_module), rollout_data(trainer)
        if not self.prompts or trainer.global_step or data is None or data.val_prompts is None:
            return
        weights = teacher_weights(module)
        prompt_of = row_prompt(module.teacher, module.tokenizer)
        if weights is None or prompt_of is None or trainer.limit_val_batches == 0:
            return
        teacher = data.evaluate(weights, prompt_of=prompt_of, most=self.prompts)
        student = data.evaluate(module.weights(), most=self.prompts)
        self.teacher_accuracy = teacher
        module.log_step({"health/teacher_accuracy": teacher, "health/student_accuracy": student})
        if teacher <= student:
            self._warn(
                trainer,
                "weak teacher",
                f"the teacher's accuracy after its own prompt is {teacher:.1%} on {self.prompts} "
                f"validation prompts, no better than the student's {student:.1%}: it has nothing "
                "to teach. Show it more, e.g. the solution instead of the answer, or use a "
                "stronger teacher.",
            )

    def on_rollout_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, rollout: int
    ) -> None:
        """Judge the previous rollout, which all callbacks have logged; read the new completions."""
        module, data = trained(pl_module), rollout_data(trainer)
        self._judge(trainer)
        if data is not None:
            self._texts = self._read(data.collector.latest, module)
            module.log_step(self._texts)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record held-out pass@k of the largest k, and warn if it falls."""
        found = largest_pass(trainer.callback_metrics)
        rewards = [row["reward/mean"] for row in self.rows if "reward/mean" in row]
        if trainer.sanity_checking or found is None or not rewards:
            return
        k, value = found
        reward = fmean(rewards[-self.window :])
        self.validations.append({"k": k, "pass": value, "reward": reward})
        self._warn(trainer, "falling pass@k", falling_pass(self.validations, self.window))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the last rollout."""
        self._judge(trainer)

    def state_dict(self) -> State:
        """Return the watched numbers and the warnings so far."""
        return {
            "rows": self.rows,
            "validations": self.validations,
            "events": self.events,
            "teacher_accuracy": self.teacher_accuracy,
            "texts": self._texts,
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Restore what ``state_dict`` returned."""
        self.rows, self.validations = state_dict["rows"], state_dict["validations"]
        self.events = [(int(rollout), str(name)) for rollout, name in state_dict["events"]]
        self.teacher_accuracy, self._texts = state_dict["teacher_accuracy"], state_dict["texts"]

    def _read(self, judged: Sequence[Judged], module: TrainedModule) -> dict[str, float]:
        """Return means over all ranks' completions of the student; empty if there are none."""
        sums = torch.zeros(4, dtype=torch.float64)
        for one in judged:
            if one.source == STUDENT:
                found = appeals(one.text, str(one.row.get("prompt")), self.phrases)
                words = count_words(one.text, self.hedges)
                again = repeated_frac(one.completion.ids)
                sums += torch.tensor([found, words, again, 1.0], dtype=torch.float64)
        leaks, hedges, repeats, count = module.reduce(sums, "sum").tolist()
        if not count:
            return {}
        return {
            "health/leak_frac": leaks / count,
            "health/hedges_mean": hedges / count,
            "health/repeat_frac": repeats / count,
        }

    def _judge(self, trainer: pl.Trainer) -> None:
        if not self._texts:
            return
        known = numbers(trainer.callback_metrics, WATCHED)
        self.rows.append({**known, **self._texts})
        self._texts = {}
        for name, sign in SIGNS.items():
            self._warn(trainer, name, sign(self.rows, self.window))

    def _warn(self, trainer: pl.Trainer, name: str, line: str | None) -> None:
        """Warn with ``line``, once for each name; None does nothing."""
        if line is None or any(name == known for _, known in self.events):
            return
        self.events.append((len(self.rows), name))
        if trainer.is_global_zero:
            warnings.warn(f"{name}: {line}", stacklevel=2)


def teacher_weights(module: TrainedModule) -> ModelWeights | None:
    """Return the weights with which a teacher starts; None if they are not in this process.

    A self-teacher of any kind starts with the student's.
    """
    if self_teachers(module.teacher):
        return module.weights()
    inner: Teacher | None = getattr(module.teacher, "teacher", None)  # in a PromptedTeacher
    return None if inner is None else inner.weights()


def row_prompt(
    teacher: Teacher | None, tokenizer: HFTokenizer
) -> Callable[[Row], list[int] | None] | None:
    """Return a function that writes a teacher's prompt for a row; None if it needs more than a row.

    A context of siblings or feedback, for example, is not known before the student has answered.
    The function returns None for a row without a context.
    """
    prompt: RowPrompt | None = getattr(teacher, "prompt", None)  # in a PromptedTeacher
    if prompt is None or (prompt.context is not None and not hasattr(prompt.context, "of_row")):
        return None

    def write(row: Row) -> list[int] | None:
        text = "" if prompt.context is None else prompt.context.of_row(row)
        return None if text is None else prompt.ids(tokenizer, row, text)

    return write


def largest_pass(metrics: Mapping[str, float | Tensor]) -> tuple[float, float] | None:
    """Return the largest k, and its pass@k on the first set that has it; None without pass@k.

    >>> largest_pass({"val/pass_at_2": 0.5, "val/pass_at_8": 0.75, "val/accuracy": 0.25})
    (8.0, 0.75)
    """
    found = [
        (float(name.rpartition(PASS)[2]), float(value))
        for name, value in metrics.items()
        if name.startswith("val/") and PASS in name
    ]
    return max(found, key=lambda pair: pair[0]) if found else None
