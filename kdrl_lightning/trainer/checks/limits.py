"""Checks what the trainer's limits leave of a run: steps, time and batches."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rollout.loader import limited
from kdrl_lightning.rollout.settings import RolloutSettings
from kdrl_lightning.trainer.internals import val_check_seconds
from kdrl_lightning.trainer.protocols import callbacks_of


def check_limits(trainer: Trainer) -> None:
    """Refuse limits of the trainer with which a run would end before its first step.

    Raises:
        ConfigurationError: ``max_steps``, ``max_epochs`` or ``max_time`` leaves nothing;
            ``val_check_interval`` or ``check_val_every_n_epoch`` is not above 0; or
            ``val_check_interval`` is a time in a run of several processes, which would validate at
            different steps.
    """
    for name in ("max_steps", "max_epochs"):
        if getattr(trainer, name) == 0:
            raise ConfigurationError(
                f"`{name}` must leave an optimizer step to train: got 0. Raise it; to train "
                "nothing, use `validate` or `export`."
            )
    for name in ("val_check_interval", "check_val_every_n_epoch"):
        every = getattr(trainer, name, None)  # Lightning sets none for a time
        if isinstance(every, int | float) and every <= 0:
            raise ConfigurationError(
                f"`{name}` must be above 0: got {every}. To never validate, set "
                "`limit_val_batches` to 0."
            )
    seconds = val_check_seconds(trainer)
    if seconds is not None and (seconds <= 0 or trainer.world_size > 1):
        raise ConfigurationError(
            "`val_check_interval` must be above 0, and no time in a run of several processes, "
            f"whose clocks differ: got {seconds:g} seconds. Give a number of micro-batches."
        )
    for callback in callbacks_of(trainer):
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            raise ConfigurationError(
                f"`max_time` must leave time to train: got {left:g} seconds. Raise it."
            )


def check_train_batches(trainer: Trainer, length: int) -> None:
    """Check that the trainer's limit of training batches leaves whole optimizer steps.

    Args:
        trainer: the run's trainer.
        length: micro-batches of a trainer epoch without a limit.

    Raises:
        ConfigurationError: it leaves none, or cuts a step.
    """
    # Lightning copies `overfit_batches`, if it is set, to the other limits.
    name = "overfit_batches" if overfit_batches(trainer) else "limit_train_batches"
    limit = overfit_batches(trainer) or trainer.limit_train_batches
    batches, accumulate = limited(length, limit), trainer.accumulate_grad_batches
    if batches % accumulate:
        raise ConfigurationError(
            f"`{name}` must not cut an optimizer step of {accumulate} micro-batches: got "
            f"{limit}, which is {batches} of {length}. Give a multiple."
        )
    if not batches:
        raise ConfigurationError(
            f"`{name}` must leave an optimizer step to train: got {limit}, which is 0 of {length} "
            f"micro-batches. Set it to {accumulate} or more."
        )


def check_evaluated_batches(trainer: Trainer, name: str, lengths: Sequence[int]) -> None:
    """Check that a limit of the evaluation leaves a batch of each set, unless it is 0.

    Args:
        trainer: the run's trainer.
        name: the trainer's limit, e.g. ``limit_val_batches``.
        lengths: batches of each set on one process.

    Raises:
        ConfigurationError: it leaves no batch of a set.
    """
    limit: int | float = getattr(trainer, name)
    for length in lengths:
        if not limit or limited(length, limit):
            continue
        if name == "limit_val_batches" and overfit_batches(trainer):
            raise ConfigurationError(
                "`overfit_batches`, which limits the validation too, must leave a batch of each "
                f"set: got {limit} of {length}. Give a number of micro-batches instead of a share, "
                "or set `data.val_prompts: null`."
            )
        raise ConfigurationError(
            f"`{name}` must leave a batch of each set: got {limit} of {length}. Give a number of "
            "batches instead of a share."
        )


def overfit_batches(trainer: Trainer) -> int | float:
    """Return ``overfit_batches``, which Lightning sets without declaring it."""
    limit: int | float = trainer.overfit_batches  # type: ignore[attr-defined]
    return limit


def overfit_rollouts(trainer: Trainer, settings: RolloutSettings, length: int) -> int:
    """Return after how many rollouts ``overfit_batches`` repeats their prompts; 0 if not set.

    Args:
        trainer: the run's trainer.
        settings: the run's rollout settings.
        length: micro-batches of a trainer epoch.

    Raises:
        ConfigurationError: an epoch would end in the middle of a rollout.
    """
    limit = overfit_batches(trainer)
    if not limit:
        return 0
    each = settings.updates_per_rollout * trainer.accumulate_grad_batches
    batches = limited(length, limit)
    if batches % each or not batches:
        raise ConfigurationError(
            f"`overfit_batches` must be a multiple of {each}, the micro-batches of one rollout: "
            f"got {limit}, which is {batches} of {length}. "
            f"Set `overfit_batches: {max(batches // each, 1) * each}`."
        )
    return batches // each


def nothing_trained(trainer: Trainer) -> str:
    """Return why a resumed run took no optimizer step, with a cure if there is one."""
    reached = {
        "max_steps": (trainer.global_step, trainer.max_steps),
        "max_epochs": (trainer.current_epoch, trainer.max_epochs),
    }
    for name, (count, most) in reached.items():
        if most is not None and 0 <= most <= count:
            return f"`{name}` {most} was reached before. Raise it to train on"
    return "`max_time`, or a callback, ended the run first"
