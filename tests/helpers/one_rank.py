"""Collectives of a group of one."""

from __future__ import annotations

from torch import Tensor


def alone(tensor: Tensor, operation: str) -> Tensor:
    """Sum over one rank."""
    assert operation == "sum"
    return tensor
