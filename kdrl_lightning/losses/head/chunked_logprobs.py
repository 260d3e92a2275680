"""Log-probability, entropy and divergence of chosen tokens, with a hand-written backward pass.

Autograd computes more than the result needs: it makes one ``[V, H]`` gradient of the head per
chunk of rows and then adds them up, and every elementwise step makes a new table of logits. Here a
chunk's logits become their gradient in place, and the matrix product accumulates the head's
gradient.

A backward pass has to recompute every chunk of logits, unless we know in advance how the loss will
depend on the tokens' values. Most losses are sums of one term per token, so a chunk's values
determine the loss's derivatives with respect to them: if ``Work.loss`` is given, the forward pass
calls it after each chunk, and computes the gradients while the chunk's logits exist. The backward
pass compares these derivatives with those that autograd hands it. If they agree up to a common
factor, it returns the gradients times the factor; if not, it recomputes the chunks. A wrong guess
therefore costs time, but never changes a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrl_lightning.losses.head.chunk_math import (
    ChunkMath,
    Divergence,
    Slopes,
    Transform,
    cut,
    differ,
)
from kdrl_lightning.losses.head.head_products import (
    HeadGradients,
    HeadProducts,
    computing_dtype,
    wide,
)

# How many of a token's values have a gradient: the first ones of ``Values``, as in ``Slopes``.
DIFFERENTIABLE = 5


class Values(NamedTuple):
    """What a pass computes for N tokens.

    Attributes:
        logprobs: ``[N]``.
        entropy: ``[N]``.
        divergence: ``[N]``; None without another model.
        asked: ``[N, K]`` log-probabilities of the tokens ``Work.asked``, or None.
        tail: ``[N]`` log-probability of all tokens but ``Work.asked`` together, or None.
        best: ``[N, K]`` ids of the most likely tokens.
        their_logprobs: ``[N]``, the other model's; like the next two, None unless
            ``Compared.scored``.
        their_entropy: ``[N]``.
        their_best: ``[N, 1]`` ids.
    """

    logprobs: Tensor
    entropy: Tensor
    divergence: Tensor | None
    asked: Tensor | None
    tail: Tensor | None
    best: Tensor
    their_logprobs: Tensor | None = None
    their_entropy: Tensor | None = None
    their_best: Tensor | None = None

    def rows(self, rows: slice) -> Values:
        """Return views of some tokens' values."""
        return Values(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class Compared(NamedTuple):
    """Another model, and the divergence from it.

    Attributes:
        logits: returns its logits ``[n, V']`` for a slice of the tokens.
        divergence: ``(logits [n, V], its logits [n, V']) -> [n]``.
        scored: whether to return its scores of the tokens, too.
    """

    logits: Callable[[slice], Tensor]
    divergence: Divergence
    scored: bool


@dataclass(frozen=True)
class Work:
    """What to compute for chosen tokens, and how.

    Attributes:
        transform: what to apply to the raw logits.
        size: rows of a chunk; no larger table of logits exists, forward or backward.
        math: the functions to call on a chunk's logits.
        top_k: number of most likely tokens to return.
        asked: ``[N, K]``, further tokens to score, or None.
        compared: another model to compare with, or None.
        loss: computes the scalar loss from the values, as a sum of one term per token; None if it
            is not known or not worth computing in advance.
    """

    transform: Transform
    size: int
    math: ChunkMath
    top_k: int = 0
    asked: Tensor | None = None
    compared: Compared | None = None
    loss: Callable[[Values], Tensor] | None = None


class ChosenTokens(torch.autograd.Function):
    """``(hidden [N, H], weight [V, H], bias [V] or None, ids [N], work) -> Values``.

    Gradients flow from the first five values to ``hidden``, ``weight`` and ``bias``.
    """

    # `ctx` is `Any`: torch's type for it declares neither the attributes set here nor its tensors.

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, work: Work
    ) -> tuple[Tensor | None, ...]:
        """Score the tokens chunk by chunk; with ``work.loss``, compute the gradients, too."""
        ctx.set_materialize_grads(False)  # a missing gradient stays None and costs nothing
        ctx.work, ctx.dtype, ctx.ahead = work, computing_dtype(hidden), None
        head = HeadProducts(weight, bias, ctx.dtype, min(work.size, len(ids)))
        values = _blank(ids, hidden.new_zeros(len(ids), dtype=wide(ctx.dtype)), work)
        run = _Pass(hidden, ids, head, work, values, torch.empty_like(values.logprobs))
        chunks = cut(0, len(ids), work.size)
        if work.loss is None:
            for rows in chunks:
                run.score(rows, run.logits(rows))
        else:
            gradients, known = HeadGradients(hidden, weight, bias, ctx.needs_input_grad, head), []
            for rows in chunks:
                logits = run.logits(rows)
                of_divergence = run.score(rows, logits, with_slope=True)
                known.append(_slopes(work.loss, values, rows))
                gradients.add(run.gradient(rows, logits, of_divergence, known[-1]), rows)
            ctx.ahead = known, gradients
        ctx.save_for_backward(hidden, weight, bias, ids, run.log_norm, values.entropy, values.tail)
        ctx.mark_non_differentiable(*(x for x in values[DIFFERENTIABLE:] if x is not None))
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the forward pass if they fit, else recompute each chunk."""
        slopes = Slopes(*grads[:DIFFERENTIABLE])
        if ctx.ahead is not None:
            (known, gradients), ctx.ahead = ctx.ahead, None  # the factor changes them in place
            factor = common_factor(Slopes(*map(_joined, zip(*known, strict=True))), slopes)
            if factor is not None:
                return (*gradients.all(factor), None, None)
            del gradients
        hidden, weight, bias, ids, log_norm, entropy, tail = ctx.saved_tensors
        # Both are outputs of the forward pass: torch.compile would look at their graph.
        entropy, tail = entropy.detach(), None if tail is None else tail.detach()
        work: Work = ctx.work
        head = HeadProducts(weight, bias, ctx.dtype, min(work.size, len(ids)))
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad, head)
        gap = torch.empty_like(entropy)
        values = Values(log_norm, entropy, gap, work.asked, tail, ids[:, None])
        run = _Pass(hidden, ids, head, work, values, log_norm)
        for rows in cut(0, len(ids), work.size):
            logits = run.logits(rows)
            of_divergence = None
            if slopes.divergence is not None:
                of_divergence = run.compare(rows, logits, with_slope=True)
            gradients.add(run.gradient(rows, logits, of_divergence, slopes.rows(rows)), rows)
        return (*gradients.all(), None, None)


def common_factor(known: Slopes, found: Slopes) -> Tensor | None:
    """Return the scalar c for which ``c * known`` equals ``found``, or None if there is none.

    The two may differ by the rounding error of the largest derivative.
    """
    if any((a is None) != (b is None) for a, b in zip(known, found, strict=True)):
        return None
    pairs = [(a, b) for a, b in zip(known, found, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    before, now = (
        torch.cat([part.flatten() for part in parts]) for parts in zip(*pairs, strict=True)
    )
    at = before.abs().argmax()
    first, second = before.take(at), now.take(at)  # `[at]` would make the host wait for a GPU
    factor = torch.where(first == 0, 1.0, second / first)
    apart = (now - factor * before).abs().max()
    rounding = 16 * torch.finfo(now.dtype).eps * now.abs().max()
    same = (apart <= rounding) & apart.isfinite()
    # Fake tensors have no values: we take the usual case. With real ones the host waits for a GPU.
    return factor if type(same) is not Tensor or bool(same) else None


def _blank(ids: Tensor, like: Tensor, work: Work) -> Values:
    """Return values filled with zeros, in the dtype of ``like [N]``."""

    def zeros(there: bool) -> Tensor | None:
        return torch.zeros_like(like) if there else None

    best, compared = ids.new_zeros(len(ids), work.top_k), work.compared is not None
    scored = work.compared is not None and work.compared.scored
    first = ids.new_zeros(len(ids), 1) if scored else None
    logprobs, entropy = torch.zeros_like(like), torch.zeros_like(like)
    gap, theirs = zeros(compared), (zeros(scored), zeros(scored))
    at = None if work.asked is None else like.new_zeros(work.asked.shape)
    tail = zeros(work.asked is not None)
    return Values(logprobs, entropy, gap, at, tail, best, *theirs, first)


def _slopes(loss: Callable[[Values], Tensor], values: Values, rows: slice) -> Slopes:
    """Return the loss's derivatives with respect to the values of ``rows``; later values are 0."""
    with torch.enable_grad():
        inner = values[:DIFFERENTIABLE]
        leaves = {i: x[rows].clone().requires_grad_() for i, x in enumerate(inner) if x is not None}
        whole = [
            None if x is None else x.slice_scatter(leaves[i], 0, rows.start, rows.stop)
            for i, x in enumerate(inner)
        ]
        total = loss(Values(*whole, *values[DIFFERENTIABLE:]))  # type: ignore[arg-type]
        if not total.requires_grad:
            return Slopes(None, None, None)
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    by_value = dict(zip(leaves, found, strict=True))
    return Slopes(*(by_value.get(i) for i in range(DIFFERENTIABLE)))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate the chunks' derivatives with respect to one value; None if a chunk has none."""
    return None if any(x is None for x in parts) else torch.cat(parts)  # type: ignore[arg-type]


class _Pass(NamedTuple):
    """What a pass over the chunks, forward or backward, does with each of them."""

    hidden: Tensor
    ids: Tensor
    head: HeadProducts
    work: Work
    values: Values
    log_norm: Tensor

    def logits(self, rows: slice) -> Tensor:
        """Return a chunk's logits ``[n, V]``, in memory that the next chunk overwrites."""
        logits = self.head.logits(self.hidden[rows])
        for tile in self.work.math.tiles(logits):
            self.work.transform.apply_(logits[tile])
        return logits

    def score(self, rows: slice, logits: Tensor, with_slope: bool = False) -> Tensor | None:
        """Fill in a chunk's values; ``with_slope`` returns the divergence's gradient, as below."""
        values, ids, top_k = self.values.rows(rows), self.ids[rows], self.work.top_k
        log_norm = self.log_norm[rows]
        asked = None if self.work.asked is None else self.work.asked[rows]
        for tile in self.work.math.tiles(logits):
            part, best = logits[tile], values.best[tile]
            found = self.work.math.score(part, ids[tile])
            values.logprobs[tile], values.entropy[tile], log_norm[tile] = found
            if top_k == 1:
                torch.argmax(part, -1, keepdim=True, out=best)
            elif top_k:
                best.copy_(part.topk(top_k, -1).indices)
            if asked is not None and values.asked is not None and values.tail is not None:
                named = self.work.math.score_asked(part, log_norm[tile], asked[tile])
                values.asked[tile], values.tail[tile] = named
        return self.compare(rows, logits, with_slope)

    def compare(self, rows: slice, logits: Tensor, with_slope: bool) -> Tensor | None:
        """Fill in a chunk's values that depend on the other model.

        With ``with_slope``, return the divergence's gradient ``[n, V]`` with respect to the logits.
        """
        values, ids, compared = self.values.rows(rows), self.ids[rows], self.work.compared
        if compared is None or values.divergence is None:
            return None
        math, theirs = self.work.math, compared.logits(rows)
        logprobs, entropy, best = values[DIFFERENTIABLE + 1 :]
        fits = theirs.shape == logits.shape and theirs.dtype == logits.dtype
        slope = theirs if fits or not with_slope else torch.empty_like(logits)
        for tile in math.tiles(logits):
            part, other = logits[tile], theirs[tile]
            if logprobs is not None and entropy is not None and best is not None:
                logprobs[tile], entropy[tile], _ = math.score(other, ids[tile])
                torch.argmax(other, -1, keepdim=True, out=best[tile])
            if with_slope:  # overwrites the other model's logits if shape and dtype agree
                values.divergence[tile], slope[tile] = differ(compared.divergence, part, other)
            else:
                values.divergence[tile] = compared.divergence(part, other)
        return slope if with_slope else None

    def gradient(
        self, rows: slice, logits: Tensor, of_divergence: Tensor | None, slopes: Slopes
    ) -> Tensor:
        """Return the loss's gradient with respect to a chunk's raw logits; may overwrite them."""
        given = self.ids[rows], self.log_norm[rows], self.values.entropy[rows]
        asked = None if self.work.asked is None else self.work.asked[rows]
        tail = None if self.values.tail is None else self.values.tail[rows]
        tiles = self.work.math.tiles(logits)
        for tile in tiles:
            table = self.work.math.gradient(
                logits[tile],
                None if of_divergence is None else of_divergence[tile],
                *(x[tile] for x in given),
                slopes.rows(tile),
                self.work.transform,
                None if asked is None else asked[tile],
                None if tail is None else tail[tile],
            )
            if len(tiles) == 1:
                return table
            logits[tile] = table
        return logits
