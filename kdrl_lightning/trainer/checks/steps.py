"""Checks for conflicts between trainer and rollouts before training starts."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rollout.settings import RolloutSettings
from kdrl_lightning.trainer.checks.limits import check_train_batches
from kdrl_lightning.trainer.protocols import callbacks_of

AVERAGE = "Average the students of several checkpoints after the run."
UNUSABLE: dict[type[Callback], tuple[str, str]] = {
    GradientAccumulationScheduler: (
        "change accumulate_grad_batches during a run",
        "Set `accumulate_grad_batches` once.",
    ),
    LearningRateFinder: ("search a learning rate", "Set `lr` of `model.optimizer`."),
    BatchSizeFinder: ("search a batch size", "Set `data.rollout.prompts_per_rollout`."),
    BaseFinetuning: ("freeze parts of the student", "Train adapters: set `model.lora`."),
    ModelPruning: ("replace the student's weights", "Prune the exported model."),
    # They swap the weights without a step, so an engine would keep its copy of the old ones.
    StochasticWeightAveraging: ("average the student's weights", AVERAGE),
    WeightAveraging: ("average the student's weights", AVERAGE),
}


def check_steps(trainer: Trainer, settings: RolloutSettings, group: int, length: int) -> None:
    """Check that rollouts divide into optimizer steps on every process.

    Args:
        trainer: the run's trainer.
        settings: the run's rollout settings.
        group: fewest completions of one prompt, including the teacher's.
        length: micro-batches of a trainer epoch.

    Raises:
        ConfigurationError: they do not divide, or the trainer would cut a step.
    """
    unit = settings.minibatches_per_rollout * trainer.world_size
    if settings.prompts_per_rollout % unit:
        raise ConfigurationError(
            f"`prompts_per_rollout` must be a multiple of minibatches_per_rollout * processes "
            f"= {unit}: got {settings.prompts_per_rollout}. Set it to "
            f"{-(-settings.prompts_per_rollout // unit) * unit}."
        )
    check_callbacks(trainer)
    rows = rows_of_step(trainer, settings, group)
    accumulate = trainer.accumulate_grad_batches
    if accumulate > rows:
        raise ConfigurationError(
            f"`accumulate_grad_batches` must be at most {rows}, the completions of one "
            f"optimizer step on one process: got {accumulate}. Lower it."
        )
    check_train_batches(trainer, length)


def check_callbacks(trainer: Trainer) -> None:
    """Refuse Lightning's callbacks that do not work with rollouts.

    Raises:
        ConfigurationError: the trainer has one of them.
    """
    for callback in callbacks_of(trainer):
        for kind, (what, cure) in UNUSABLE.items():
            if isinstance(callback, kind):
                name = type(callback).__name__
                raise ConfigurationError(f"`callbacks` must not {what}: got {name}. {cure}")


def rows_of_step(trainer: Trainer, settings: RolloutSettings, group: int) -> int:
    """Return the completions of one optimizer step on one process."""
    unit = settings.minibatches_per_rollout * trainer.world_size
    return settings.prompts_per_rollout // unit * group


def check_micro_batches(
    trainer: Trainer, settings: RolloutSettings, group: int, longest_prompt: int
) -> None:
    """Check that a micro-batch of the longest completions fits the limit of tokens.

    Raises:
        ConfigurationError: it does not fit; the message names the accumulation that would fit.
    """
    limit = settings.max_tokens_per_micro_batch
    if limit is None:
        return
    rows = rows_of_step(trainer, settings, group)
    longest = longest_prompt + settings.max_tokens
    worst = -(-rows // trainer.accumulate_grad_batches) * longest
    if worst <= limit:
        return
    cure = f"Set `accumulate_grad_batches` {-(-rows // max(limit // longest, 1))}."
    if longest > limit:
        cure = (
            f"One completion may have {longest} with its prompt: lower `max_tokens`, or drop long "
            "prompts."
        )
    raise ConfigurationError(
        f"`max_tokens_per_micro_batch` must hold the longest completions with their prompts, "
        f"{worst} tokens with accumulate_grad_batches {trainer.accumulate_grad_batches}: got "
        f"{limit}. {cure}"
    )


def longest_that_fits(trainer: Trainer, settings: RolloutSettings, group: int) -> int | None:
    """Return the longest prompt whose completions fit a micro-batch; None without a limit."""
    limit = settings.max_tokens_per_micro_batch
    if limit is None:
        return None
    each = -(-rows_of_step(trainer, settings, group) // trainer.accumulate_grad_batches)
    return limit // each - settings.max_tokens
