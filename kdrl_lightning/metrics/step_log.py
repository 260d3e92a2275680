"""The log of optimizer steps: callbacks see each value at once, loggers get a row per step.

We do not use ``LightningModule.log``, which takes a quarter of a millisecond per value: it copies
the description of a metric that can be reduced in many ways. We log about 45 final values per
step, and that call took a tenth of the time of the embedded task (docs/speed.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kdrl_lightning.rollout_batch import upload


class RowLogger(Protocol):
    """The part of Lightning's ``Logger`` that a ``StepLog`` calls."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write one row."""

    def save(self) -> None:
        """Write buffered rows to disk."""


class Placed(Protocol):
    """The part of Lightning's ``Strategy`` that a ``StepLog`` reads."""

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""


class LoggedRun(Protocol):
    """The part of Lightning's ``Trainer`` that a ``StepLog`` uses."""

    should_stop: bool

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Values that callbacks read."""

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The values logged last."""

    @property
    def strategy(self) -> Placed:
        """The strategy, which knows the device."""

    @property
    def loggers(self) -> Sequence[RowLogger]:
        """The loggers of the run."""

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far."""

    @property
    def current_epoch(self) -> int:
        """Epochs finished so far."""


class StepLog:
    """Collects the values of optimizer steps; a name keeps its last value until ``forget``.

    None removes a name, so that a mean over nothing leaves a gap in the log.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._restored: dict[str, float] = {}
        self.names: set[str] = set()  # all so far, also those logged as None
        self._written = 0  # the optimizer step of the last row that the loggers have

    def add(self, trainer: LoggedRun, values: Mapping[str, float | None]) -> None:
        """Keep values for the next row, and put them into the trainer's ``callback_metrics``."""
        self.names.update(values)
        for name in [name for name, value in values.items() if value is None]:
            for table in (self._values, trainer.callback_metrics, trainer.logged_metrics):
                table.pop(name, None)
        known = {name: value for name, value in values.items() if value is not None}
        if not known:
            return
        self._values.update(known)
        row = upload(torch.tensor(list(known.values())), trainer.strategy.root_device)
        shown = dict(zip(known, row.unbind(), strict=True))
        trainer.callback_metrics.update(shown)
        trainer.logged_metrics.update(shown)

    def write(self, trainer: LoggedRun) -> None:
        """Pass the values to the loggers every ``log_every_n_steps``; call it after a step."""
        every = getattr(trainer, "log_every_n_steps", 0)  # which Lightning's class does not declare
        due = every and (trainer.should_stop or trainer.global_step % every == 0)
        if not due or not self._values:
            return
        row = {**self._values, "epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step - 1)
            logger.save()

    def write_once(self, trainer: LoggedRun) -> None:
        """Write the row, unless the loggers already have this optimizer step."""
        if self._written != trainer.global_step:
            self._written = trainer.global_step
            self.write(trainer)

    def end_step(self, trainer: LoggedRun) -> None:
        """Write the row once; after the last step of a rollout also forget the values.

        So the rows of all steps of a rollout have the values that are logged once per rollout.
        """
        self.write_once(trainer)
        if ends_rollout(trainer):
            self.forget()

    def reset(self) -> None:
        """Forget the values of an earlier run."""
        self._written = 0
        self.names = set()
        self.forget()

    def forget(self) -> None:
        """Drop the values, so that a later row repeats none that was not measured again."""
        self._values.clear()
        self._restored = {}

    def state_dict(self, trainer: LoggedRun) -> dict[str, float]:
        """Return the values that the next row repeats unless they are measured again."""
        return {} if ends_rollout(trainer) else dict(self._values)

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Keep a checkpoint's values for ``resume``."""
        self._restored = dict(state_dict)

    def resume(self, trainer: LoggedRun) -> None:
        """Add a checkpoint's values, except those measured since then; call it as training begins.

        An earlier call would be lost: Lightning empties ``callback_metrics`` after the sanity
        check.
        """
        restored, self._restored = self._restored, {}
        self.add(trainer, {**restored, **self._values})


def numbers(metrics: Mapping[str, Tensor | float], names: Iterable[str]) -> dict[str, float]:
    """Return the values of those ``names`` that are in ``metrics``; a GPU is read once."""
    found = {name: torch.as_tensor(metrics[name]) for name in names if name in metrics}
    out: dict[str, float] = {}
    for device in {value.device for value in found.values()}:
        here = {name: value for name, value in found.items() if value.device == device}
        row = torch.stack([value.detach().double() for value in here.values()])
        out |= dict(zip(here, row.tolist(), strict=True))
    return {name: out[name] for name in found}


def ends_rollout(trainer: LoggedRun) -> bool:
    """Return whether the last optimizer step was the last one of a rollout."""
    data = getattr(trainer, "datamodule", None)
    return int(trainer.global_step) % int(getattr(data, "updates_per_rollout", 1)) == 0
