"""What an optimizer step measured, shown to callbacks and handed to the loggers.

Written by hand because ``LightningModule.log`` takes a quarter of a millisecond a value: it copies
the description of a metric that may be reduced in many ways. These are finished numbers, about 45
a step, and that was a tenth of the time of the embedded task (docs/speed.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class StepLog:
    """Collects values, as ``log_dict`` does; the last of a name stays until ``forget``.

    None takes a name out: a mean that has nothing to average leaves a gap, not its last value.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._restored: dict[str, float] = {}
        self._written = 0  # optimizer steps, with the last one that the loggers have

    def add(self, trainer: Any, values: Mapping[str, float | None]) -> None:
        """Note values, and show them in the trainer's ``callback_metrics`` at once."""
        for name in [name for name, value in values.items() if value is None]:
            for table in (self._values, trainer.callback_metrics, trainer.logged_metrics):
                table.pop(name, None)
        known = {name: value for name, value in values.items() if value is not None}
        if not known:
            return
        self._values.update(known)
        row = torch.tensor(list(known.values())).to(trainer.strategy.root_device)
        shown = dict(zip(known, row.unbind(), strict=True))
        trainer.callback_metrics.update(shown)
        trainer.logged_metrics.update(shown)

    def write(self, trainer: Any) -> None:
        """Hand them to the loggers, every ``log_every_n_steps``; call it after a step's end."""
        every = trainer.log_every_n_steps
        due = every and (trainer.should_stop or trainer.global_step % every == 0)
        if not due or not self._values:
            return
        row = {**self._values, "epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step - 1)
            logger.save()

    def write_once(self, trainer: Any) -> None:
        """Write, unless the loggers have this optimizer step already."""
        if self._written != trainer.global_step:
            self._written = trainer.global_step
            self.write(trainer)

    def end_step(self, trainer: Any) -> None:
        """Write once; after the last step of a rollout forget, too.

        The numbers of a rollout stand in the rows of each of its steps.
        """
        self.write_once(trainer)
        if ends_rollout(trainer):
            self.forget()

    def reset(self) -> None:
        """Forget a run that was stopped."""
        self._written = 0
        self.forget()

    def forget(self) -> None:
        """Drop them, so that no later row repeats what was not measured again."""
        self._values.clear()
        self._restored = {}

    def state_dict(self, trainer: Any) -> dict[str, float]:
        """Return the numbers that the next row repeats unless they are measured again."""
        return {} if ends_rollout(trainer) else dict(self._values)

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Keep a checkpoint's numbers for ``resume``."""
        self._restored = dict(state_dict)

    def resume(self, trainer: Any) -> None:
        """Add a checkpoint's numbers once training begins; those logged since then win.

        Not earlier: after the sanity check Lightning empties the tables that ``add`` fills.
        """
        restored, self._restored = self._restored, {}
        self.add(trainer, {**restored, **self._values})


def ends_rollout(trainer: Any) -> bool:
    """Whether the last optimizer step was a rollout's last."""
    data = getattr(trainer, "datamodule", None)
    return int(trainer.global_step) % int(getattr(data, "updates_per_rollout", 1)) == 0
