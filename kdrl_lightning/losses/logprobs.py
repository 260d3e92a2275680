"""Scores of chosen tokens, computed from hidden states in chunks.

We wrote it by hand because no library that we use returns per-token log-probabilities *and* entropy
at a temperature with a soft-capped head: torch's ``linear_cross_entropy`` returns no entropy, and
on its chunked path no unreduced values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.losses.logprobs_backward import ChosenTokens, OfLogits, Transform

Divergence: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# A float32 softmax cannot distinguish e^-30 from 0, so teachers' log-probabilities end here.
LOGPROB_FLOOR = -30.0
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
        vocab_size: number of rows to use, which cuts off a teacher's padding rows; None: all.
        swap: two ids to exchange the logits of (a teacher's end token and the student's), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    swap: tuple[int, int] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``[N, V]`` logits of ``[N, H]`` hidden states, in float32 at least."""
        rows = slice(None, self.vocab_size)
        logits = F.linear(hidden, self.weight[rows], None if self.bias is None else self.bias[rows])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        logits = logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()
        return self.order(logits)

    def order(self, logits: Tensor) -> Tensor:
        """Return ``[..., V]`` logits with the two ids of ``swap`` exchanged."""
        if self.swap is None:
            return logits
        there, back = list(self.swap), list(reversed(self.swap))
        return logits.index_copy(-1, logits.new_tensor(there, dtype=torch.long), logits[..., back])

    def renamed(self, ids: Tensor) -> Tensor:
        """Return the ids with the two of ``swap`` exchanged: the rows that score these ids."""
        if self.swap is None:
            return ids
        first, second = self.swap
        return torch.where(ids == first, second, torch.where(ids == second, first, ids))


class TokenScores(NamedTuple):
    """A model's scores of chosen tokens; N is any leading shape, ``[B, T]`` in a batch.

    Attributes:
        logprobs: ``[N]`` log-probabilities of the chosen tokens, in nats.
        entropy: ``[N]`` nats; None from a teacher that does not return it.
        topk_ids: ``[N, K]`` int64, the model's most likely tokens, best first.
        topk_logprobs: ``[N, K]`` log-probabilities of the requested ids.
        divergence: ``[N]`` nats, from another model's distribution, over the full vocabulary.
        tail_logprobs: ``[N]`` log-probability of all other tokens together; None from a teacher
            that does not return it.
    """

    logprobs: Tensor
    entropy: Tensor | None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    divergence: Tensor | None = None
    tail_logprobs: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenScores:
        """Return a copy with ``function`` applied to every field that is not None."""
        logprobs, *rest = self
        changed = (None if value is None else function(value) for value in rest)
        return TokenScores(function(logprobs), *changed)


class Other(NamedTuple):
    """Another model's last hidden states ``[N, H]`` for the same tokens, and its head."""

    hidden: Tensor
    head: Head


def chosen_logprobs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each chosen token's log-probability ``[N]`` and the entropy ``[N]`` there, in nats.

    These are the first two fields of ``token_scores``, which describes the arguments and errors.
    """
    scores = token_scores(hidden, head, ids, temperature, chunk_size)
    assert scores.entropy is not None, "token_scores always computes the entropy"
    return scores.logprobs, scores.entropy


def token_scores(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    *,
    top_k: int = 0,
    topk_ids: Tensor | None = None,
    other: Other | None = None,
    divergence: Divergence | None = None,
) -> TokenScores:
    """Return the scores of chosen tokens.

    Only one chunk of logits exists at a time, forward and backward: the backward pass recomputes
    the chunks, so memory grows with ``chunk_size * V`` and not with ``N * V``.

    Args:
        hidden: ``[N, H]`` last hidden states, one row per predicted token.
        head: the language-model head.
        ids: ``[N]`` int64, the chosen tokens.
        temperature: divisor of the logits, above 0.
        chunk_size: rows per chunk; None: as many as give about 64 MiB of float32 logits, at most
            1024.
        top_k: number of the model's most likely tokens to return in ``topk_ids``.
        topk_ids: ``[N, K]``, further tokens to return log-probabilities of.
        other: the model that ``divergence`` compares with, at the same temperature.
        divergence: ``(logits [n, V], other logits [n, V]) -> [n]``.

    Returns:
        Scores in nats, float32 or float64, with gradient; None in each field not requested.

    Raises:
        ConfigurationError: the temperature or the chunk size is out of range.
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigurationError(f"`temperature` must be above 0: got {temperature}. 1.0 is usual.")
    if chunk_size is not None:
        require_between("chunk_size", chunk_size, 1, float("inf"))
    vocab = head.vocab_size or head.weight.shape[0]
    size = chunk_size or auto_chunk_size(vocab)
    if topk_ids is None:
        bias = None if head.bias is None else head.bias[:vocab]
        transform = Transform(head.scale, head.softcap, temperature)
        chosen = ChosenTokens.apply(  # type: ignore[no-untyped-call]
            hidden,
            head.weight[:vocab],
            bias,
            head.renamed(ids),
            transform,
            size,
            min(top_k, vocab),
            _from(other, head, temperature, divergence),
        )
        logprobs, entropy, best, gap = chosen
        return TokenScores(logprobs, entropy, head.renamed(best) if top_k else None, None, gap)
    scores = _asked(hidden, head, ids, temperature, size, top_k, topk_ids)
    if divergence is None:
        return scores
    apart = token_scores(hidden, head, ids, temperature, size, other=other, divergence=divergence)
    return scores._replace(divergence=apart.divergence)


def _from(
    other: Other | None, head: Head, temperature: float, divergence: Divergence | None
) -> OfLogits | None:
    """Return the divergence as a function of logits and of their rows."""
    if other is None or divergence is None:
        return None
    device = other.hidden.device.type
    # The backward pass runs outside this context, where a GPU's default is float16.
    autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def gap(logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad(), torch.autocast(device, dtype, autocast):
            theirs = other.head.logits(other.hidden[rows]) / temperature
        return divergence(head.order(logits)[:, : theirs.shape[-1]], theirs)

    return gap


def _asked(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    temperature: float,
    size: int,
    top_k: int,
    topk_ids: Tensor,
) -> TokenScores:
    """Score the chosen tokens and those of ``topk_ids``; autograd recomputes the chunks."""

    def score(states: Tensor, chosen: Tensor, asked: Tensor) -> TokenScores:
        logits = head.logits(states) / temperature
        log_norm = logits.logsumexp(-1)
        logprobs = logits.gather(-1, chosen[:, None]).squeeze(-1) - log_norm
        # A softmax entry of 0 with a logit of -inf adds 0; their product would be NaN.
        expected = (logits.softmax(-1) * logits.masked_fill(logits == -torch.inf, 0.0)).sum(-1)
        vocab = logits.shape[-1]
        best = logits.detach().topk(min(top_k, vocab), -1).indices if top_k else None
        at = logits.gather(-1, asked.clamp(max=vocab - 1)) - log_norm[:, None]
        at = at.masked_fill(asked >= vocab, -torch.inf)  # ids that this model does not have
        tail = _tail(logits, asked, log_norm)
        return TokenScores(logprobs, log_norm - expected, best, at, None, tail)

    parts = []
    for start in range(0, max(len(ids), 1), size):  # at least once: no tokens need a graph too
        rows = slice(start, start + size)
        chunk = hidden[rows], ids[rows], topk_ids[rows]
        parts.append(
            checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else score(*chunk)
        )
    logprobs, *rest = zip(*parts, strict=True)
    joined = (None if c[0] is None else torch.cat(c) for c in rest)
    return TokenScores(torch.cat(logprobs), *joined)


def _tail(logits: Tensor, asked: Tensor, log_norm: Tensor) -> Tensor:
    """Return the log-probability of all tokens outside ``asked`` together; -inf without any.

    We sum their logits, because one minus the other probabilities has no correct digit below 1e-7.

    Args:
        logits: ``[n, V]``.
        asked: ``[n, K]`` ids; this model has no token for ids from V on.
        log_norm: ``[n]`` logsumexp of the logits.
    """
    vocab, lowest = logits.shape[-1], torch.finfo(logits.dtype).min
    named = torch.zeros(len(logits), vocab + 1, dtype=torch.bool, device=logits.device)
    named = named.scatter_(1, asked.clamp(max=vocab), True)[:, :vocab]
    rest = logits.masked_fill(named, lowest).logsumexp(-1)  # finite: -inf has no gradient
    return torch.where(rest > lowest / 2, rest - log_norm, -torch.inf)


def auto_chunk_size(vocab_size: int) -> int:
    """Return how many rows of float32 logits take about 64 MiB, at least 1 and at most 1024.

    >>> auto_chunk_size(151_936), auto_chunk_size(19)
    (110, 1024)
    """
    return max(1, min(CHUNK_BYTES // (4 * vocab_size), MAX_CHUNK))
