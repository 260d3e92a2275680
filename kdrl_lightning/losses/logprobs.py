"""Log-probabilities and entropy of chosen tokens, straight from hidden states, in chunks.

Written by hand because no library at hand gives per-token log-probabilities *and* entropy at a
temperature with a soft-capped head: torch's ``linear_cross_entropy`` returns neither entropy nor,
on its chunked path, unreduced values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kdrl_lightning.errors import ConfigurationError, require_between

CHUNK_BYTES = 64 << 20
MAX_CHUNK = 1024


@dataclass(frozen=True)
class Head:
    """A language-model head: ``softcap(scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        scale: factor on the logits (Granite divides them, Cohere multiplies them).
        softcap: ``c * tanh(logits / c)`` (Gemma 2), or None.
        vocab_size: rows that count; a teacher's padding rows behind it are cut off.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """``[N, H]`` hidden states to ``[N, V]`` logits, in float32 at least."""
        rows = slice(None, self.vocab_size)
        logits = F.linear(hidden, self.weight[rows], None if self.bias is None else self.bias[rows])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def chosen_logprobs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each chosen token and the entropy of its distribution.

    Only one chunk of logits exists at a time, forward and backward: chunks are recomputed in the
    backward pass, so memory grows with ``chunk_size * V`` and not with ``N * V``.

    Args:
        hidden: ``[N, H]`` last hidden states, one row per predicted token.
        head: the language-model head.
        ids: ``[N]`` int64, the chosen tokens.
        temperature: logits are divided by it; above 0.
        chunk_size: rows per chunk; None takes about 64 MiB of float32 logits, at most 1024 rows.

    Returns:
        ``(logprobs [N], entropy [N])`` in nats, float32 or float64, with gradient.

    Raises:
        ConfigurationError: temperature or chunk size out of range.
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigurationError(f"`temperature` must be above 0: got {temperature}.")
    if chunk_size is not None:
        require_between("chunk_size", chunk_size, 1, float("inf"))
    size = chunk_size or auto_chunk_size(head.vocab_size or head.weight.shape[0])
    if not len(ids):
        empty = head.logits(hidden[:0]).sum() + hidden[:0].sum()
        nothing = empty.expand(0)
        return nothing, nothing
    parts = [
        checkpoint(_chunk, h, head, i, temperature, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else _chunk(h, head, i, temperature)
        for h, i in zip(hidden.split(size), ids.split(size), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def auto_chunk_size(vocab_size: int) -> int:
    """Rows whose float32 logits take about 64 MiB.

    >>> auto_chunk_size(151_936), auto_chunk_size(19)
    (110, 1024)
    """
    return max(1, min(CHUNK_BYTES // (4 * vocab_size), MAX_CHUNK))


def _chunk(hidden: Tensor, head: Head, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head.logits(hidden) / temperature
    log_norm = logits.logsumexp(-1)
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1) - log_norm
    # A softmax entry of 0 times a logit of -inf is no contribution, not NaN.
    expected = (logits.softmax(-1) * logits.masked_fill(logits == -torch.inf, 0.0)).sum(-1)
    return chosen, log_norm - expected
