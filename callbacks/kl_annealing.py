"""KDRL-Annealing: a teacher KL coefficient that falls linearly to a floor."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl

from kdrl_lightning.errors import ConfigurationError, require_between


class KLCoefficientAnnealing(pl.Callback):
    """Sets the objective's ``teacher_kl_coef`` to ``max(start - decrement * step, floor)``.

    KDRL (arXiv 2506.02208): the defaults are the paper's; the floor is reached at step 80. The
    coefficient follows from ``trainer.global_step``, so that a resumed run needs no state.

    Args:
        start: coefficient at step 0.
        floor: smallest coefficient, at most ``start``.
        decrement: fall per step, above 0.
        unit: what a step is.
    """

    def __init__(
        self,
        start: float = 5e-3,
        floor: float = 1e-3,
        decrement: float = 5e-5,
        unit: Literal["rollout", "optimizer_step"] = "rollout",
    ) -> None:
        require_between("floor", floor, 0.0, start, "The coefficient falls from start to floor.")
        if not 0.0 < decrement < float("inf"):
            raise ConfigurationError(f"`decrement` must be above 0 and finite: got {decrement}.")
        require_between("start", start, 0.0, float("inf"))
        if unit not in ("rollout", "optimizer_step"):
            raise ConfigurationError(f"`unit` must be rollout or optimizer_step: got {unit}.")
        self.start = start
        self.floor = floor
        self.decrement = decrement
        self.unit = unit

    def coef_at(self, step: int) -> float:
        """Coefficient at a step.

        >>> KLCoefficientAnnealing().coef_at(0), KLCoefficientAnnealing().coef_at(80)
        (0.005, 0.001)
        """
        return max(self.start - self.decrement * step, self.floor)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Check that there is a coefficient to set."""
        objective = pl_module.objective
        if stage == "fit" and not hasattr(objective, "teacher_kl_coef"):
            raise ConfigurationError(
                "KLCoefficientAnnealing needs an objective with a `teacher_kl_coef`: got "
                f"{type(objective).__name__}. Use KDRL or OnPolicyDistillation, or drop it."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Set the coefficient before the first rollout."""
        self._set(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the coefficient for the next update."""
        pl_module.log("kd/teacher_kl_coef", pl_module.objective.teacher_kl_coef)
        self._set(trainer, pl_module)

    def _set(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if self.unit == "rollout":
            step = trainer.datamodule.rollout_at(step)  # type: ignore[attr-defined]
        pl_module.objective.teacher_kl_coef = self.coef_at(step)
