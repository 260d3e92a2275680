"""Sets a coefficient of the objective by a schedule; KDRL-Annealing is one."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from kdrl_lightning.callbacks.base import RolloutCallback, updates_per_rollout
from kdrl_lightning.callbacks.schedules import LinearWithFloor, PlateauSwitch, Schedule
from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives.base import COEFFICIENTS, check_coefficient
from kdrl_lightning.trainer.protocols import TrainedModule, callbacks_of, trained

METRICS = {
    "teacher_kl_coef": "kd/teacher_kl_coef",
    "trrd_alpha": "kd/trrd_alpha",
    "distill_coef": "kd/distill_coef",
    "mix": "kd/mix",
}


class CoefficientSchedule(RolloutCallback):
    """Sets one coefficient of the objective before each rollout or optimizer step.

    The value is a function of ``trainer.global_step``, so a resumed run needs no state; only
    ``PlateauSwitch`` has a state, which checkpoints hold. You can use several of these callbacks,
    each for a different coefficient.

    Args:
        coefficient: ``teacher_kl_coef``, ``trrd_alpha``, ``entropy_coef``, ``ref_kl_coef``,
            ``rl_coef``, ``reward_coef``, ``distill_coef`` or ``mix``.
        schedule: the coefficient's value at each step.
        unit: whether a step of the schedule is a rollout or an optimizer step.
    """

    def __init__(
        self,
        coefficient: str,
        schedule: Schedule,
        unit: Literal["rollout", "optimizer_step"] = "rollout",
    ) -> None:
        if coefficient not in COEFFICIENTS:
            raise ConfigurationError(
                f"`coefficient` must be one of {', '.join(COEFFICIENTS)}: got {coefficient}. "
                "Choose one of them."
            )
        if unit not in ("rollout", "optimizer_step"):
            raise ConfigurationError(
                f"`unit` must be rollout or optimizer_step: got {unit}. Choose one of them."
            )
        for value in schedule.extremes():
            check_coefficient(coefficient, value)
        self._before: tuple[float, bool] | None = None
        self.coefficient = coefficient
        self.schedule = schedule
        self.unit = unit

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint, different for each coefficient."""
        return self._generate_state_key(coefficient=self.coefficient)

    @property
    def metric(self) -> str:
        """Name under which the coefficient is logged."""
        return METRICS.get(self.coefficient, f"policy/{self.coefficient}")

    def coef_at(self, step: int) -> float:
        """Return the coefficient at a step, counted in ``unit``."""
        return self.schedule.coef_at(step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the objective has the coefficient, and that no other callback sets it."""
        if stage != "fit":
            return
        twins = [
            c
            for c in callbacks_of(trainer)
            if isinstance(c, CoefficientSchedule) and c.coefficient == self.coefficient
        ]
        if len(twins) > 1:
            raise ConfigurationError(
                f"`callbacks` must have one schedule for {self.coefficient}: got {len(twins)}. "
                "Remove the others."
            )
        if isinstance(self.schedule, PlateauSwitch):
            self.schedule.reset()
            if trainer.limit_val_batches == 0:
                raise ConfigurationError(
                    "`schedule` PlateauSwitch must have a validation to watch: got none. "
                    "Give `val_prompts`, or use Switch."
                )
        objective = trained(pl_module).objective
        self._before = objective.coefficient(self.coefficient), objective.needs_reference
        _put_last(trainer)
        if self.coefficient == "ref_kl_coef" and max(self.schedule.extremes()) > 0.0:
            objective.needs_reference = True  # even if the schedule starts at 0

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the objective's coefficient."""
        module = trained(pl_module)
        if self._before is not None:
            coefficient, module.objective.needs_reference = self._before
            module.objective.set_coefficient(self.coefficient, coefficient)
            self._before = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the coefficient before the first rollout."""
        self._set(trainer, trained(pl_module))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Log the coefficient of this update."""
        module = trained(pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        value = module.objective.coefficient(self.coefficient)
        module.log_step({self.metric: float(value)})

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the coefficient of the next update."""
        self._set(trainer, trained(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the validation's metric to a plateau switch."""
        schedule = self.schedule
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not isinstance(schedule, PlateauSwitch) or not fitting:
            return
        if schedule.monitor not in trainer.callback_metrics:
            raise ConfigurationError(
                f"`monitor` must be a metric of the validation: got {schedule.monitor}. "
                f"Known: {', '.join(sorted(trainer.callback_metrics))}."
            )
        value = float(trainer.callback_metrics[schedule.monitor])
        schedule.observe(value, self._step(trainer))
        self._set(trainer, trained(pl_module))

    def state_dict(self) -> State:
        """Return the state of a plateau switch; empty for other schedules."""
        return self.schedule.state_dict() if isinstance(self.schedule, PlateauSwitch) else {}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the state of a plateau switch."""
        if isinstance(self.schedule, PlateauSwitch):
            self.schedule.load_state_dict(state_dict)

    def _step(self, trainer: pl.Trainer) -> int:
        each = updates_per_rollout(trainer) if self.unit == "rollout" else 1
        return trainer.global_step // each

    def _set(self, trainer: pl.Trainer, pl_module: TrainedModule) -> None:
        value = self.coef_at(self._step(trainer))
        pl_module.objective.set_coefficient(self.coefficient, value)


class KLCoefficientAnnealing(CoefficientSchedule):
    """Sets the objective's ``teacher_kl_coef`` to ``max(start - decrement * step, floor)``.

    KDRL (arXiv 2506.02208): the defaults are the paper's and reach the floor at step 80. This is
    ``CoefficientSchedule`` with ``LinearWithFloor``.

    Args:
        start: coefficient at step 0.
        floor: smallest coefficient, at most ``start``.
        decrement: decrease per step, above 0.
        unit: whether a step is a rollout or an optimizer step.

    >>> KLCoefficientAnnealing().coef_at(0), KLCoefficientAnnealing().coef_at(80)
    (0.005, 0.001)
    """

    def __init__(
        self,
        start: float = 5e-3,
        floor: float = 1e-3,
        decrement: float = 5e-5,
        unit: Literal["rollout", "optimizer_step"] = "rollout",
    ) -> None:
        super().__init__("teacher_kl_coef", LinearWithFloor(start, floor, decrement), unit)


def _put_last(trainer: pl.Trainer) -> None:
    """Move schedules after the other callbacks, which must log their update's coefficient."""
    callbacks = callbacks_of(trainer)
    schedules = [c for c in callbacks if isinstance(c, CoefficientSchedule)]
    savers = [c for c in callbacks if isinstance(c, Checkpoint)]
    others = [c for c in callbacks if not isinstance(c, CoefficientSchedule | Checkpoint)]
    # We make a new list, because Lightning iterates over the old one.
    trainer.callbacks = [*others, *schedules, *savers]  # type: ignore[attr-defined]
