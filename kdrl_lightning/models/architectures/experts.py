"""How a mixture of experts is computed."""

from __future__ import annotations

from typing import Any

import torch


def keep_precision(model: Any) -> bool:
    """Run experts one by one in a float64 model: grouped products take at most 32 bits.

    Returns whether the implementation changed.
    """
    if model.dtype != torch.float64 or model.config._experts_implementation != "grouped_mm":
        return False
    model.set_experts_implementation("eager")
    return True
