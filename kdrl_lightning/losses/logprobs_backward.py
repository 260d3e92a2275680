"""Log-probability, entropy and divergence of chosen tokens, with a hand-written backward pass.

Autograd computes more than the result needs: it makes one ``[V, H]`` gradient of the head per chunk
of rows and then adds them up, and every elementwise step makes a new table of logits. This backward
pass changes a chunk's table in place and adds its gradient in the matrix product. The mathematics
is the same, and it is 1.5 times as fast (docs/speed.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

# Smallest shifted logit. e^-10000 is 0, and 0 times -10000 is 0, where -inf would give NaN.
FLOOR = -1e4


# A divergence ``[n]`` as a function of ``logits [n, V]`` and of their rows.
OfLogits: TypeAlias = Callable[[Tensor, slice], Tensor]


class Transform(NamedTuple):
    """Changes the logits ``hidden @ weight.T + bias`` by scale, soft cap and temperature."""

    scale: float
    softcap: float | None
    temperature: float

    def apply_(self, logits: Tensor) -> Tensor:
        """Change ``[n, V]`` logits in place and return them."""
        if self.softcap is None:
            factor = self.scale / self.temperature
            return logits if factor == 1.0 else logits.mul_(factor)
        capped = logits.mul_(self.scale / self.softcap).tanh_()
        return capped.mul_(self.softcap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative by the raw logits; ``logits`` is the result of ``apply_``."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        share = logits * (self.temperature / self.softcap)
        return share.square_().neg_().add_(1.0).mul_(factor)


class ChosenTokens(torch.autograd.Function):
    """``(hidden [N, H], weight [V, H], bias [V] or None, ids [N]) -> logprobs [N], entropy [N]``.

    It also returns the ``top_k`` most likely tokens ``[N, K]``, without gradient, and the
    divergence ``[N]``, or None without one. Autograd differentiates the divergence by the logits of
    one chunk. Tables of logits have ``size`` rows, forward and backward.
    """

    # `ctx` is `Any`: torch's type of it declares neither the attributes set here nor its tensors.

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        transform: Transform,
        size: int,
        top_k: int,
        divergence: OfLogits | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Score the tokens, a chunk at a time."""
        ctx.set_materialize_grads(False)  # a missing gradient stays None and costs nothing
        ctx.transform, ctx.size, ctx.dtype = transform, size, _computing_dtype(hidden)
        ctx.divergence = divergence
        wide = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        logprobs, entropy, log_norm = (hidden.new_empty(len(ids), dtype=wide) for _ in range(3))
        best = ids.new_empty(len(ids), top_k)
        gap = None if divergence is None else torch.empty_like(logprobs)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, ctx.dtype)
            for rows in _chunks(len(ids), size):
                logits = transform.apply_(head.logits(hidden[rows]))
                if top_k == 1:
                    torch.argmax(logits, -1, keepdim=True, out=best[rows])
                elif top_k:
                    best[rows] = logits.topk(top_k, -1).indices
                if divergence is not None and gap is not None:
                    gap[rows] = divergence(logits, rows)
                chosen = logits.gather(-1, ids[rows, None]).squeeze(-1)
                peak = logits.amax(-1, keepdim=True)
                logits.sub_(peak).clamp_(min=FLOOR)
                shares = logits.exp()
                total = shares.sum(-1)
                log_norm[rows] = total.log() + peak.squeeze(-1)
                logprobs[rows] = chosen - log_norm[rows]
                entropy[rows] = total.log() - shares.mul_(logits).sum(-1) / total
        ctx.save_for_backward(hidden, weight, bias, ids, log_norm, entropy)
        ctx.mark_non_differentiable(best)
        return logprobs, entropy, best, gap

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        d_logprobs: Tensor | None,
        d_entropy: Tensor | None,
        _: Tensor | None,
        d_gap: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Rebuild each chunk and add up its gradients."""
        hidden, weight, bias, ids, log_norm, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head = _Head(weight, bias, ctx.dtype)
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=log_norm.dtype) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=log_norm.dtype) if needs_bias else None
        for rows in _chunks(len(ids), ctx.size):
            table = ctx.transform.apply_(head.logits(hidden[rows]))
            slope = ctx.transform.slope(table)
            of_gap = None
            if d_gap is not None:
                of_gap = _gradient(ctx.divergence, table, rows, d_gap[rows])
            if d_logprobs is None and d_entropy is None:
                table.zero_()
            else:
                _to_gradient(
                    table.sub_(log_norm[rows, None]),
                    entropy[rows, None],
                    ids[rows, None],
                    None if d_logprobs is None else d_logprobs[rows, None],
                    None if d_entropy is None else d_entropy[rows, None],
                )
            table = table if of_gap is None else table.add_(of_gap)
            table = table.mul_(slope) if isinstance(slope, Tensor) or slope != 1.0 else table
            if of_bias is not None:
                of_bias += table.sum(0)
            head.add_gradients(table, hidden[rows], rows, of_hidden, of_weight)
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _to_gradient(
    table: Tensor,
    entropy: Tensor,
    ids: Tensor,
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
) -> None:
    """Turn log-probabilities ``[n, V]`` into the gradient by the logits; others are ``[n, 1]``."""
    if d_entropy is None:
        table.exp_()
    else:  # dH/dz = -p (log p + H)
        table.clamp_(min=FLOOR)
        shares = table.exp()
        table.add_(entropy).mul_(d_entropy)
        if d_logprobs is not None:
            table.add_(d_logprobs)
        table.mul_(shares).neg_()
    if d_logprobs is not None:  # d log p_y / dz = [y] - p
        if d_entropy is None:
            table.mul_(-d_logprobs)
        table.scatter_add_(1, ids, d_logprobs)


def _gradient(divergence: OfLogits, logits: Tensor, rows: slice, d_gap: Tensor) -> Tensor:
    """Return the divergence's gradient by the logits ``[n, V]``."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(leaf, rows), leaf, d_gap)
    return gradient


class _Head:
    """Weight and bias in the type of the matrix products."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return new ``[n, V]`` logits in float32 at least; the caller may change them in place."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return logits if logits.dtype == torch.float64 else logits.float()

    def add_gradients(
        self,
        table: Tensor,
        hidden: Tensor,
        rows: slice,
        of_hidden: Tensor | None,
        of_weight: Tensor | None,
    ) -> None:
        """Add one chunk's gradients; ``table`` is the gradient by its logits ``[n, V]``."""
        narrow = table.to(self.weight.dtype)
        if of_hidden is not None:
            of_hidden[rows] = narrow @ self.weight
        if of_weight is None:
            return
        if of_weight.dtype == narrow.dtype:
            of_weight.addmm_(narrow.T, hidden.to(narrow.dtype))
        else:  # a 16-bit sum over many chunks would lose small values
            of_weight += narrow.T @ hidden.to(narrow.dtype)


def _computing_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
