"""Builds the optimizer and its schedule from the callables of a configuration."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import ConfigurationError


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    make: OptimizerCallable,
    make_scheduler: LRSchedulerCallable | None,
) -> tuple[Optimizer, LRScheduler | None]:
    """Return an optimizer over the trainable parameters, and its schedule.

    Args:
        parameters: all parameters of the student.
        make: ``parameters -> optimizer``.
        make_scheduler: ``optimizer -> schedule``; None keeps the learning rate.

    Raises:
        ConfigurationError: torch refuses a setting, or the schedule needs a metric.
    """
    check_step(make)
    try:
        optimizer = make([p for p in parameters if p.requires_grad])
        scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    except ConfigurationError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"`optimizer` and `lr_scheduler` must have valid arguments: got {error}. Correct them."
        ) from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigurationError(
            "`lr_scheduler` must be a schedule of steps: got ReduceLROnPlateau, which needs a "
            "metric. Use LinearLR or OneCycleLR, or the callback EarlyStopping."
        )
    return optimizer, scheduler


def check_step(make: OptimizerCallable) -> None:
    """Check that an optimizer can step with gradients alone, in a trial on one small weight.

    Raises:
        ConfigurationError: it needs a closure (LBFGS) or sparse gradients (SparseAdam).
    """
    weight = nn.Parameter(torch.zeros(8, 8))
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer = make([weight])
    except Exception:  # it needs the student's parameters, or its arguments are wrong
        return
    takes_closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if takes_closure is not None and takes_closure.default is inspect.Parameter.empty:
        reason = "which evaluates the loss several times a step"
    else:
        try:
            optimizer.step()
            return
        except Exception as error:
            reason = f"whose step raises {type(error).__name__}: {error}"
    raise ConfigurationError(
        f"`optimizer` must step with one dense gradient per weight: got "
        f"{type(optimizer).__name__}, {reason}. Use AdamW."
    )


def state_names(make: OptimizerCallable) -> set[str]:
    """Return the names of an optimizer's state per weight, from a trial step on a small one.

    Args:
        make: ``parameters -> optimizer``.

    Returns:
        The names, e.g. ``exp_avg``; empty if the trial fails.
    """
    weight = nn.Parameter(torch.zeros(8, 8))
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer = make([weight])
        optimizer.step()
    except Exception:  # it needs the student's parameters
        return set()
    return set(optimizer.state[weight])


def check_moments(names: set[str], optimizer: Optimizer, state: State) -> None:
    """Check that an optimizer can continue with the moments of a checkpoint.

    torch calls this function before it loads them; torch alone would fail with a less clear
    message, or in the first step.

    Args:
        names: names of the optimizer's state per weight, see ``state_names``.
        optimizer: the run's optimizer.
        state: the optimizer's ``state_dict`` in the checkpoint.

    Raises:
        ConfigurationError: it has other parameter groups, or lacks one of ``names``.
    """
    sizes = [
        [len(group["params"]) for group in groups]
        for groups in (optimizer.param_groups, state["param_groups"])
    ]
    # Not weight by weight: Adafactor keeps different moments for vectors and matrices.
    held = {name for moments in state["state"].values() for name in moments}
    absent = names - held if held else set()
    if sizes[0] == sizes[1] and not absent:
        return
    what = f"groups of {sizes[1]} parameters: got {sizes[0]}"
    if absent:
        what = f"moments: got settings that need {', '.join(sorted(absent))}, too"
    raise ConfigurationError(
        f"`optimizer` must have the checkpoint's {what}. Set it as in that run, or export that "
        "student and start from it."
    )


def check_length(scheduler: LRScheduler | None, steps: int) -> None:
    """Check that a schedule has enough steps for a run.

    Args:
        scheduler: the schedule; None is constant.
        steps: optimizer steps of the run; -1 if it has no limit.

    Raises:
        ConfigurationError: a OneCycleLR ends before the run, and would then raise an error.
    """
    end = getattr(scheduler, "total_steps", None)
    if isinstance(scheduler, OneCycleLR) and isinstance(end, int) and 0 <= end < steps:
        raise ConfigurationError(
            f"`lr_scheduler` must last for `max_steps` {steps}: got OneCycleLR with total_steps "
            f"{end}. Set its `total_steps: {steps}`."
        )


def for_lightning(optimizer: Optimizer, scheduler: LRScheduler | None) -> OptimizerLRScheduler:
    """Return optimizer and schedule in the form that ``configure_optimizers`` returns."""
    if scheduler is None:
        return optimizer
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }


def check_precision(precision: str) -> None:
    """Refuse a precision in which small updates of weights would round away.

    Args:
        precision: the trainer's ``precision``.

    Raises:
        ConfigurationError: weights would be in 16 bits, or the loss would be scaled.
    """
    if precision in ("bf16-true", "16-true", "16-mixed"):
        raise ConfigurationError(
            "`precision` must keep float32 weights, without a loss scaler, for training: got "
            f"{precision}. Use bf16-mixed or 32-true: in 16-bit weights an update of 1e-6 rounds "
            "away."
        )


def clip_gradients(
    plugin: Precision, optimizer: Optimizer, value: float | None, algorithm: str | None
) -> None:
    """Clip gradients as Lightning does, also for a fused optimizer.

    Under ``bf16-mixed`` Lightning refuses fused optimizers, because they may undo a loss scaler's
    factor after the clipping. ``check_precision`` refuses loss scalers.

    Args:
        plugin: the trainer's precision plugin.
        optimizer: the optimizer whose gradients are clipped in place.
        value: the largest norm, or value; None or 0 clips nothing.
        algorithm: ``norm`` or ``value``; None: ``norm``.
    """
    kind = GradClipAlgorithmType(algorithm or GradClipAlgorithmType.NORM)
    Precision.clip_gradients(plugin, optimizer, value or 0.0, kind)


class ZeroRateWarning:
    """Warns once if the schedule ends before the run: the student then learns nothing more."""

    def __init__(self) -> None:
        self._warned = False

    def check(self, optimizer: Optimizer, step: int) -> None:
        """Warn if all learning rates are 0 after the first step."""
        rates = [group["lr"] for group in optimizer.param_groups]
        if step and not any(rates) and not self._warned:
            self._warned = True
            warnings.warn(
                f"the learning rate is 0 from step {step} on: `lr_scheduler` ends before the run. "
                "Give it as many steps as `max_steps`.",
                stacklevel=2,
            )
