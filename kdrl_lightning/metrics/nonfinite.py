"""Optimizer steps whose loss or gradient is not finite: skipped, counted, in the end refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdrl_lightning.errors import TrainingStopped, require_between


class NonFiniteSteps:
    """Watches the gradients of each optimizer step.

    Args:
        allowed: steps in a row that are skipped; one more stops the run.

    Attributes:
        skipped: steps skipped so far.
    """

    def __init__(self, allowed: int) -> None:
        require_between("max_nonfinite_steps", allowed, 0, float("inf"))
        self.allowed = allowed
        self.skipped = 0
        self._in_a_row = 0

    def check(self, parameters: Sequence[nn.Parameter], loss: float, step: int) -> Tensor:
        """Drop the gradients of a step that is not finite; all ranks see the same.

        Returns:
            The gradient's norm; NaN where the step is skipped.

        Raises:
            TrainingStopped: that has happened too often in a row.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = _full(torch.nn.utils.get_total_norm(gradients))
        if bool(torch.isfinite(norm)) and abs(loss) < float("inf"):
            self._in_a_row = 0
            return norm
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        for parameter in parameters:
            parameter.grad = None  # an optimizer leaves such a parameter alone
        if self._in_a_row > self.allowed:
            raise TrainingStopped(
                f"loss or gradient was not finite for {self._in_a_row} optimizer steps in a row, "
                f"the last at step {step}: loss {loss}, gradient norm {float(norm)}. Lower the "
                "learning rate, or clip gradients."
            )
        return torch.full_like(norm, torch.nan)

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"skipped_steps": self.skipped, "skipped_in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self._in_a_row = state["skipped_steps"], state["skipped_in_a_row"]


def _full(value: Tensor) -> Tensor:
    """Return a plain tensor also where parameters are sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value
