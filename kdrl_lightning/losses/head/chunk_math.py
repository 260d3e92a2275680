"""Token values and their gradients from a table of logits: plain torch on CPU, compiled on a GPU.

Both run the same functions of ``[n, V]`` logits. Plain torch runs them on a few rows at a time, so
that intermediate results stay in the processor's cache: on one core, scoring a chunk of 333 rows at
V = 50,257 takes 1.4 ns a logit that way and 6.7 ns on the whole chunk. ``torch.compile`` fuses them
into one or two passes over the chunk.

We compile these functions instead of calling the kernels of Liger or cut-cross-entropy, which
return a loss or a log-probability without entropy, top token or divergence, and run on GPUs only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kdrl_lightning.losses.head.compiled import OrPlain

# Smallest shifted logit. e^-10000 is 0, and 0 times -10000 is 0; with -inf it would be NaN.
FLOOR = -1e4

# Logits that plain torch works on at once: 1 MiB of float32 on a CPU, 256 MiB on a GPU.
CPU_LOGITS, GPU_LOGITS = 1 << 18, 1 << 26
# A tile is the part of a chunk that one call works on. A chunk of fake tensors has at most about
# this many; a large chunk, as on a GPU, a quarter.
FEW_TILES = 16

# The name of these functions in a warning.
PART = "the head of the model"

# Computes a divergence ``[n]`` from ``logits [n, V]`` and another model's logits.
Divergence: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Transform(NamedTuple):
    """Applies scale, soft cap and temperature to the raw logits ``hidden @ weight.T + bias``."""

    scale: float
    softcap: float | None
    temperature: float

    def apply_(self, logits: Tensor) -> Tensor:
        """Transform ``[n, V]`` raw logits in place and return them."""
        if self.softcap is None:
            factor = self.scale / self.temperature
            return logits if factor == 1.0 else logits.mul_(factor)
        capped = logits.mul_(self.scale / self.softcap).tanh_()
        return capped.mul_(self.softcap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative with respect to the raw logits, from the result of ``apply_``."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        share = logits * (self.temperature / self.softcap)
        return share.square_().neg_().add_(1.0).mul_(factor)


class Slopes(NamedTuple):
    """Derivatives of a loss with respect to n tokens' values; None for a value that it ignores.

    Each is ``[n]``, except ``asked`` ``[n, K]``: it belongs to the log-probabilities of K further
    tokens that the caller requested.
    """

    logprobs: Tensor | None
    entropy: Tensor | None
    divergence: Tensor | None
    asked: Tensor | None = None
    tail: Tensor | None = None

    def rows(self, rows: slice) -> Slopes:
        """Return the derivatives of these rows."""
        return Slopes(*(None if slope is None else slope[rows] for slope in self))


def score(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of ``ids [n]``, entropy and logsumexp, ``[n]`` each."""
    peak = logits.amax(-1, keepdim=True)
    shifted = (logits - peak).clamp_(min=FLOOR)
    shares = shifted.exp()
    total = shares.sum(-1)
    log_norm = total.log() + peak.squeeze(-1)
    entropy = total.log() - shares.mul_(shifted).sum(-1) / total
    return logits.gather(-1, ids[:, None]).squeeze(-1) - log_norm, entropy, log_norm


def score_asked(logits: Tensor, log_norm: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities ``[n, K]`` of K tokens, and ``[n]`` of all others together.

    A token that this model does not have gets -inf; so does the second result if no token is left.
    It sums exponentials, because 1 minus the K probabilities has no correct digit below 1e-7.

    Args:
        logits: ``[n, V]``.
        log_norm: ``[n]``, logsumexp of the logits.
        asked: ``[n, K]`` ids; this model has no token for ids of V and above.
    """
    vocab, lowest = logits.shape[-1], torch.finfo(logits.dtype).min
    at = logits.gather(-1, asked.clamp(max=vocab - 1)) - log_norm[:, None]
    at = at.masked_fill(asked >= vocab, -torch.inf)
    rest = logits.masked_fill(named(asked, vocab), lowest).logsumexp(-1)
    return at, torch.where(rest > lowest / 2, rest - log_norm, -torch.inf)


def named(asked: Tensor, vocab: int) -> Tensor:
    """Return a mask ``[n, V]`` that is True for the tokens ``asked [n, K]``."""
    mask = torch.zeros(len(asked), vocab + 1, dtype=torch.bool, device=asked.device)
    return mask.scatter_(1, asked.clamp(max=vocab), True)[:, :vocab]


def add_asked(
    table: Tensor, logits: Tensor, log_norm: Tensor, asked: Tensor, tail: Tensor, slopes: Slopes
) -> Tensor:
    """Add the gradient that flows through ``slopes.asked`` and ``slopes.tail`` to ``table``.

    Args:
        table: ``[n, V]``, the gradient with respect to the logits so far, changed in place.
        logits: ``[n, V]``, after the transform.
        log_norm: ``[n]``, logsumexp of the logits.
        asked: ``[n, K]`` ids.
        tail: ``[n]``, log-probability of all other tokens.
        slopes: derivatives of the loss with respect to each token's values.
    """
    vocab, known = logits.shape[-1], asked < logits.shape[-1]
    shares, total = (logits - log_norm[:, None]).exp_(), torch.zeros_like(log_norm)
    if slopes.asked is not None:
        d_asked = slopes.asked.masked_fill(~known, 0.0)
        table.scatter_add_(1, asked.clamp(max=vocab - 1), d_asked)
        total = total + d_asked.sum(-1)
    if slopes.tail is not None:
        some = tail > -torch.inf
        d_tail = torch.where(some, slopes.tail, 0.0)
        edge = (log_norm + torch.where(some, tail, 0.0))[:, None]
        rest = (logits - edge).exp_().masked_fill_(named(asked, vocab), 0.0)
        table.addcmul_(rest, d_tail[:, None])
        total = total + d_tail
    return table.addcmul_(shares, total[:, None], value=-1.0)


def differ(divergence: Divergence, logits: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergence ``[n]`` and its gradient with respect to ``logits [n, V]``."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        gap = divergence(leaf, theirs)
        (slope,) = torch.autograd.grad(gap.sum(), leaf)
    return gap.detach(), slope


def gradient(
    logits: Tensor,
    of_divergence: Tensor | None,
    ids: Tensor,
    log_norm: Tensor,
    entropy: Tensor,
    slopes: Slopes,
    transform: Transform,
    asked: Tensor | None = None,
    tail: Tensor | None = None,
) -> Tensor:
    """Return the gradient of a loss with respect to the raw logits ``[n, V]``.

    Args:
        logits: ``[n, V]``, after ``transform``.
        of_divergence: ``[n, V]``, the divergence's gradient with respect to ``logits``, or None.
        ids: ``[n]``, the chosen tokens.
        log_norm: ``[n]``, logsumexp of the logits.
        entropy: ``[n]``, in nats.
        slopes: derivatives of the loss with respect to each token's values.
        transform: what turned the raw logits into ``logits``.
        asked: ``[n, K]``, further tokens whose log-probabilities the loss reads, or None.
        tail: ``[n]``, log-probability of all tokens but ``asked``, or None.
    """
    d_logprobs, d_entropy = (None if x is None else x[:, None] for x in slopes[:2])
    if d_entropy is not None:  # dH/dz = -p (log p + H)
        table = (logits - log_norm[:, None]).clamp_(min=FLOOR)
        shares = table.exp()
        table.add_(entropy[:, None]).mul_(d_entropy)
        if d_logprobs is not None:
            table.add_(d_logprobs)
        table.mul_(shares).neg_()
    elif d_logprobs is not None:
        table = (logits - log_norm[:, None]).exp_().mul_(-d_logprobs)
    else:
        table = torch.zeros_like(logits)
    if d_logprobs is not None:  # d log p_y / dz = [y] - p
        table.scatter_add_(1, ids[:, None], d_logprobs)
    if slopes.divergence is not None and of_divergence is not None:
        table.addcmul_(of_divergence, slopes.divergence[:, None])
    if asked is not None and tail is not None:
        table = add_asked(table, logits, log_norm, asked, tail, slopes)
    slope = transform.slope(logits)
    return table.mul_(slope) if isinstance(slope, Tensor) or slope != 1.0 else table


class ChunkMath(NamedTuple):
    """The functions of this file, plain or compiled, and how many logits to call them on.

    Attributes:
        score: see the function of this name.
        gradient: see the function of this name.
        score_asked: see the function of this name.
        run: returns a divergence's plain or compiled form.
        logits: how many logits to call them on at once; None: a whole chunk.
    """

    score: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[..., Tensor]
    score_asked: Callable[..., tuple[Tensor, Tensor]]
    run: Callable[[Divergence], Divergence]
    logits: int | None

    def tiles(self, logits: Tensor) -> list[slice]:
        """Return slices of the rows of ``[n, V]`` logits, one for each call."""
        rows, width = logits.shape
        at_once = logits.numel() if self.logits is None else self.logits
        if type(logits) is not Tensor:  # planning with fake tensors takes time for each operation
            few = FEW_TILES if logits.numel() <= FEW_TILES << 20 else FEW_TILES // 4
            at_once = max(at_once, logits.numel() // few)
        return cut(0, rows, max(1, at_once // width))


def cut(start: int, stop: int, size: int) -> list[slice]:
    """Return slices of ``size`` rows that cover ``start`` to ``stop``; the last may be shorter."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def plain_math(logits: int) -> ChunkMath:
    """Return the functions uncompiled, to be called on this many logits at once."""
    return ChunkMath(score, gradient, score_asked, lambda divergence: divergence, logits)


@cache
def compiled_math() -> ChunkMath:
    """Return the functions compiled, to be called on a whole chunk."""
    # We keep one object per divergence, because torch.compile would compile a new one again.
    run = partial(OrPlain, part=PART)
    return ChunkMath(run(score), run(gradient), run(score_asked), cache(run), None)


def math_for(hidden: Tensor) -> ChunkMath:
    """Return the fastest form for these states: compiled on CUDA, plain elsewhere."""
    if hidden.device.type != "cuda":
        return plain_math(CPU_LOGITS)
    # Fake tensors, which we use to plan memory, are a subclass and need no compiler.
    return compiled_math() if type(hidden) is Tensor else plain_math(GPU_LOGITS)
