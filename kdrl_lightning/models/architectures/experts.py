"""Implementation of a mixture of experts."""

from __future__ import annotations

import torch

from kdrl_lightning.common.untyped import HFModel


def keep_precision(model: HFModel) -> bool:
    """Let a float64 model run its experts one by one: grouped products take at most 32 bits.

    Returns:
        Whether the implementation changed.
    """
    if model.dtype != torch.float64 or model.config._experts_implementation != "grouped_mm":
        return False
    model.set_experts_implementation("eager")
    return True
