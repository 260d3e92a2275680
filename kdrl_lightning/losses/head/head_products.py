"""The matrix products of a language-model head, one chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


def computing_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with ``hidden``: autocast's if enabled, else its own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sums_wide(left: Tensor) -> bool:
    """Return whether a product of 16-bit ``left`` can have a float32 result: only on CUDA."""
    return left.device.type == "cuda" and left.dtype in NARROW


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``hidden [n, H] @ weight.T [H, V] + bias [V]`` in float32 at least, without gradient.

    Args:
        hidden: ``[n, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        dtype: the dtype of the product's inputs.
        out: ``[n, V]`` memory for the result; None allocates it.
    """
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _project(hidden.to(dtype), weight.to(dtype), bias, out)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if sums_wide(hidden):
        into = {} if out is None else {"out": out}
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32, **into)
        return logits if bias is None else logits.add_(bias)
    if hidden.dtype in NARROW:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return logits.float() if out is None else out.copy_(logits)
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


class HeadProducts:
    """A head, cast to the dtype of its products, with reused memory for the logits of one chunk.

    Args:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        dtype: the dtype of the products' inputs.
        rows: maximum number of rows of a chunk.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self._table = weight.new_empty(rows, len(weight), dtype=wide(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``[n, V]`` logits in float32 at least, in memory that the next call overwrites."""
        table = self._table[: len(hidden)]
        return project(hidden, self.weight, self.bias, self.weight.dtype, table)


class HeadGradients:
    """Accumulates the gradients of hidden states, weight and bias over chunks.

    Args:
        hidden: ``[N, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        needs: whether hidden states, weight and bias need a gradient.
        head: the same head, in the dtype of its products.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, ...],
        head: HeadProducts,
    ) -> None:
        self.head, self.hidden = head, hidden
        self.kinds = [x.dtype for x in (hidden, weight, weight if bias is None else bias)]
        kind = wide(head.weight.dtype)
        self.of_hidden = torch.empty_like(hidden) if needs[0] else None
        # A 16-bit sum over many chunks would round small values away.
        self.of_weight = torch.zeros_like(weight, dtype=kind) if needs[1] else None
        self.of_bias = None
        if bias is not None and needs[2]:
            self.of_bias = torch.zeros_like(bias, dtype=kind)

    def add(self, table: Tensor, rows: slice) -> None:
        """Add a chunk's gradients; ``table [n, V]`` is the gradient with respect to its logits."""
        with torch.autocast(table.device.type, enabled=False):
            if self.of_bias is not None:
                self.of_bias += table.sum(0)
            narrow = table.to(self.head.weight.dtype)
            if self.of_hidden is not None:
                self.of_hidden[rows] = narrow @ self.head.weight
            if self.of_weight is not None:
                add_product(self.of_weight, narrow.T, self.hidden[rows].to(narrow.dtype))

    def all(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states, weight and bias in their dtypes, times ``factor``.

        A gradient that is not needed is None. ``factor`` changes the accumulated ones in place.
        """
        found = (self.of_hidden, self.of_weight, self.of_bias)
        return tuple(
            None if x is None else (x if factor is None else x.mul_(factor)).to(kind)
            for x, kind in zip(found, self.kinds, strict=True)
        )


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total`` in place; ``total`` may have a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif sums_wide(left):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
