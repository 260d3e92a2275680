"""Prints where the time of a rollout and its updates goes."""

from __future__ import annotations

import time

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile

from kdrl_lightning.callbacks.base import RolloutCallback
from kdrl_lightning.errors import require_count
from kdrl_lightning.metrics.step_log import numbers
from kdrl_lightning.trainer.protocols import trained


class StepProfile(RolloutCallback):
    """Prints, once, the time of each phase of a rollout, and the operators that take longest.

    torch's profiler runs on rank 0, from the sampling of one rollout to its last update. It makes
    both slower.

    Args:
        rollout: which rollout to profile, counted from this start or resume of the run; at least 1,
            because rollout 0 has one-time costs.
        operators: number of operators in the table.
    """

    def __init__(self, rollout: int = 1, operators: int = 15) -> None:
        require_count("rollout", rollout, 1, float("inf"), "Give 1 for the second.")
        require_count("operators", operators, 1, float("inf"))
        self.rollout = rollout
        self.operators = operators
        self.text = ""
        self._profile: profile | None = None
        self._rollouts = 0
        self._began: float | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Note when the updates begin."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._profile is not None and self._began is None:
            self._began = time.perf_counter()

    def on_rollout_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: int
    ) -> None:
        """Start the profiler when the previous rollout ends; print when the profiled one does."""
        module = trained(pl_module)
        if not trainer.is_global_zero:
            return
        self._rollouts += 1
        if self._rollouts == self.rollout:
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if module.device.type == "cuda" else []
            self._profile = profile(activities=kinds)
            self._profile.__enter__()
        elif self._profile is not None:
            self._finish(trainer, module.device)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the profile of a rollout that the run did not finish."""
        if self._profile is not None:
            self._finish(trainer, trained(pl_module).device)

    def _finish(self, trainer: pl.Trainer, device: torch.device) -> None:
        running, self._profile = self._profile, None
        assert running is not None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended = time.perf_counter()
        running.__exit__(None, None, None)
        metrics = trainer.callback_metrics
        times = numbers(metrics, [name for name in metrics if name.startswith("time/")])
        phases = {name[5:-2]: value for name, value in times.items()}
        if self._began is not None:
            phases["updates"] = ended - self._began
        seconds = [f"{name} {value:.3g} s" for name, value in phases.items()]
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        found = running.key_averages().table(
            sort_by=order, row_limit=self.operators, max_name_column_width=48
        )
        self.text = f"phases of the rollout: {', '.join(seconds)}\n{found}"
        print(self.text)
