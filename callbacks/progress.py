"""A progress bar that counts rollouts."""

from __future__ import annotations

import sys
from typing import NoReturn

import lightning.pytorch as pl
from tqdm import tqdm

from kdrl_lightning.callbacks.base import RolloutCallback, updates_per_rollout
from kdrl_lightning.metrics.step_log import numbers
from kdrl_lightning.trainer.protocols import rollout_data

SHOWN = {
    "val/accuracy": "val",
    "reward/mean": "reward",
    "kd/reverse_kl": "teacher_kl",
    "rollout/length_mean": "length",
    "loss/nll": "nll",
}


class RolloutProgress(RolloutCallback):
    """Shows one progress bar for the run: rollouts done, time left, and the main metrics.

    Without a terminal it prints a line every few seconds instead.

    Args:
        description: text before the bar.
    """

    def __init__(self, description: str = "rollouts") -> None:
        self.description = description
        self._bar: tqdm[NoReturn] | None = None
        self._per = 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the number of rollouts in the run, and open the bar."""
        if not trainer.is_global_zero:
            return
        data = rollout_data(trainer)
        self._per = updates_per_rollout(trainer)
        steps = trainer.estimated_stepping_batches
        total = None if steps == float("inf") else -(-int(steps) // self._per)
        if data is not None:
            amount = "no step limit" if total is None else f"{steps} steps = {total} rollouts"
            print(
                f"{amount}, each of {data.rollout.prompts_per_rollout} prompts x "
                f"{data.completions_per_prompt} completions for {self._per} optimizer steps",
                flush=True,
            )
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=trainer.global_step / self._per,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.4g}/{total_fmt} "
            "[{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            unit="step" if data is None else "rollout",
            desc=self.description,
            mininterval=0.2 if terminal else 5.0,
            file=sys.stderr,
            dynamic_ncols=terminal,
        )

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Advance by one update, a fraction of a rollout."""
        if self._bar is None:
            return
        done = trainer.global_step / self._per
        if done > self._bar.n:
            metrics = numbers(trainer.callback_metrics, SHOWN)
            shown = {SHOWN[name]: f"{value:.3g}" for name, value in metrics.items()}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(done - self._bar.n)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show that a validation is running."""
        if self._bar is not None:
            self._bar.set_description_str(f"{self.description} (validating)")
        elif trainer.is_global_zero:
            print("measuring the student on the validation prompts", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the rollouts again."""
        if self._bar is not None:
            self._bar.set_description_str(self.description, refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the error starts on a new line."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
