"""KDRL-Annealing: a teacher KL coefficient that falls linearly to a floor."""

from __future__ import annotations

from typing import Literal

from kdrl_lightning.callbacks.schedule import CoefficientSchedule
from kdrl_lightning.callbacks.schedules import LinearWithFloor


class KLCoefficientAnnealing(CoefficientSchedule):
    """Sets the objective's ``teacher_kl_coef`` to ``max(start - decrement * step, floor)``.

    KDRL (arXiv 2506.02208): the defaults are the paper's and reach the floor at step 80. The
    class is ``CoefficientSchedule`` with ``LinearWithFloor``.

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
