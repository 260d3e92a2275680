"""Skips and counts optimizer steps with a loss or gradient that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdrl_lightning.errors import TrainingStopped, require_count


class NonFiniteSteps:
    """Checks loss and gradients of each optimizer step, and counts the skipped steps.

    Args:
        allowed: number of consecutive steps to skip; the next one stops the run.

    Attributes:
        skipped: steps skipped so far.

    Raises:
        ConfigurationError: ``allowed`` is negative.
    """

    def __init__(self, allowed: int) -> None:
        require_count("max_nonfinite_steps", allowed, 0, float("inf"))
        self.allowed = allowed
        self.skipped = 0
        self._in_a_row = 0

    def check(self, parameters: Sequence[nn.Parameter], loss: float, step: int) -> float:
        """Drop the gradients of a step that is not finite; all ranks decide alike.

        Args:
            parameters: the optimizer's parameters, with their gradients.
            loss: the step's loss over all ranks.
            step: optimizer steps so far, for the message.

        Returns:
            The norm of the gradient; NaN if the step is skipped.

        Raises:
            TrainingStopped: more than ``allowed`` steps in a row were not finite.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = float(_full(torch.nn.utils.get_total_norm(gradients)))
        if math.isfinite(norm) and math.isfinite(loss):
            self._in_a_row = 0
            return norm
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        for parameter in parameters:
            parameter.grad = None  # optimizers do not change a parameter without a gradient
        if self._in_a_row > self.allowed:
            raise TrainingStopped(
                f"loss or gradient was not finite for {self._in_a_row} optimizer steps in a row, "
                f"the last at step {step}: loss {loss}, gradient norm {norm}. Lower the "
                "learning rate, or clip gradients."
            )
        return math.nan

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"skipped_steps": self.skipped, "skipped_in_a_row": self._in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counts."""
        self.skipped, self._in_a_row = state["skipped_steps"], state["skipped_in_a_row"]


def _full(value: Tensor) -> Tensor:
    """Return the whole tensor of a possibly sharded one."""
    return value.full_tensor() if isinstance(value, DTensor) else value
