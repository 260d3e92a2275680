"""Scores of chosen tokens, computed from hidden states in chunks.

We wrote our own because no library that we use returns per-token log-probabilities *and* entropy at
a temperature with a soft-capped head: torch's ``linear_cross_entropy`` returns no entropy, and on
its chunked path no unreduced values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrl_lightning.errors import ConfigurationError, require_count
from kdrl_lightning.losses.head.chunk_math import Divergence, Transform, math_for
from kdrl_lightning.losses.head.chunked_logprobs import ChosenTokens, Compared, Values, Work
from kdrl_lightning.losses.head.head_products import computing_dtype, project

# We raise teachers' log-probabilities to this floor: adding e^-30 to 1 changes nothing in float32,
# and a lower or infinite value would dominate a loss.
LOGPROB_FLOOR = -30.0
# If a chunk's logits take at least this many floating-point operations, the forward pass should
# compute the gradients, too. This saves a recomputation of the logits and costs a call of the
# objective, about 2 ms. The GPU works on the chunk during the call; it idles only if three products
# take less than the call (calculated with 400 TFLOP/s, not measured).
PAYS_FROM = {"cpu": 2e9, "cuda": 2.7e11}

# Chunks on CUDA are large: small matrix products would not fill the GPU, and each chunk reads and
# writes the head's whole gradient.
CUDA_CHUNK_BYTES = 1 << 30
CHUNK_BYTES = 64 << 20
MAX_CHUNK = 1024


@dataclass(frozen=True)
class Head:
    """A language-model head: ``softcap(scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        scale: factor on the logits (Granite divides them, Cohere multiplies them).
        softcap: the c of ``c * tanh(logits / c)`` (Gemma 2), or None.
        vocab_size: number of rows to use, which cuts off a teacher's padding rows; None: all.
        swap: two ids whose logits are exchanged (a teacher's end token and the student's), or None.
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
        weight, bias = self.weight[rows], None if self.bias is None else self.bias[rows]
        if torch.is_grad_enabled():
            logits = F.linear(hidden, weight, bias)
            logits = logits if logits.dtype == torch.float64 else logits.float()
        else:
            logits = project(hidden, weight, bias, computing_dtype(hidden))
        if self.scale != 1.0:
            logits = logits * self.scale
        logits = logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()
        return self.order(logits)

    def order(self, logits: Tensor) -> Tensor:
        """Return ``[..., V]`` logits with the two ids of ``swap`` exchanged."""
        if self.swap is None:
            return logits
        low, high = sorted(self.swap)
        # With slices, unlike with a list of ids, the host does not wait for a GPU.
        first, second = logits[..., low : low + 1], logits[..., high : high + 1]
        between, after = logits[..., low + 1 : high], logits[..., high + 1 :]
        return torch.cat([logits[..., :low], second, between, first, after], -1)

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
        topk_logprobs: ``[N, K]`` log-probabilities of the ids that the caller gave, not of
            ``topk_ids``.
        divergence: ``[N]`` nats, from another model's distribution, over the full vocabulary.
        tail_logprobs: ``[N]`` log-probability of all tokens that ``topk_logprobs`` leaves out; None
            from a teacher that does not return it.
        chunk_places: ``[B, T]`` int64, chunks of a teacher with another tokenizer, see
            ``losses/teacher_chunks.py``; None: each token has its own score.
        other: the scores that another model gives the same tokens, without gradient.
    """

    logprobs: Tensor
    entropy: Tensor | None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    divergence: Tensor | None = None
    tail_logprobs: Tensor | None = None
    chunk_places: Tensor | None = None
    other: TokenScores | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenScores:
        """Return a copy with ``function`` applied to every field that is not None."""
        logprobs, *rest, other = self
        entropy, best, at, gap, tail, places = (None if x is None else function(x) for x in rest)
        further = None if other is None else other.map(function)
        return TokenScores(function(logprobs), entropy, best, at, gap, tail, places, further)


class Other(NamedTuple):
    """Another model, usually the teacher, to compare with at the same tokens.

    Attributes:
        hidden: ``[N, H]``, its last hidden states.
        head: its head.
        scored: whether to return its scores of the tokens (log-probability, entropy, most likely
            token) in ``TokenScores.other``.
        per_row: whether it read other prompts than the first model, so rows that are equal for the
            first may differ for it.
    """

    hidden: Tensor
    head: Head
    scored: bool = False
    per_row: bool = False


# Computes a scalar loss from scores, differentiably.
Loss: TypeAlias = Callable[[TokenScores], Tensor]


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
    loss: Loss | None = None,
) -> TokenScores:
    """Return the scores of chosen tokens.

    Only one chunk of logits exists at a time, forward and backward: memory grows with
    ``chunk_size * V`` and not with ``N * V``. The backward pass recomputes the chunks, unless you
    give the ``loss``: then the forward pass computes the gradients, too.

    Args:
        hidden: ``[N, H]`` last hidden states, one row per predicted token.
        head: the language-model head.
        ids: ``[N]`` int64, the chosen tokens.
        temperature: divisor of the logits, above 0.
        chunk_size: rows per chunk; None: as ``auto_chunk_size`` says.
        top_k: number of the model's most likely tokens to return in ``topk_ids``.
        topk_ids: ``[N, K]``, further tokens whose log-probabilities to return.
        other: the model that ``divergence`` compares with, at the same temperature.
        divergence: ``(logits [n, V], other logits [n, V]) -> [n]``.
        loss: the scalar that you will compute from these scores, a sum in which each token's term
            depends on no other token's scores. It is called once per chunk, with 0 in place of the
            scores of later chunks. If you then compute another loss, the gradients are still right,
            but take longer.

    Returns:
        Scores in nats, float32 or float64, with gradient; None in each field not requested.

    Raises:
        ConfigurationError: the temperature or the chunk size is out of range.
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigurationError(f"`temperature` must be above 0: got {temperature}. 1.0 is usual.")
    if chunk_size is not None:
        require_count("chunk_size", chunk_size, 1, float("inf"))
    vocab = head.vocab_size or head.weight.shape[0]
    size = chunk_size or auto_chunk_size(vocab, hidden.device.type)

    def named(values: Values) -> TokenScores:
        return _named(values, head if top_k else None)

    math = math_for(hidden)
    known = torch.is_grad_enabled() and len(ids) > 0
    work = Work(
        Transform(head.scale, head.softcap, temperature),
        size,
        math,
        min(top_k, vocab),
        None if topk_ids is None else head.renamed(topk_ids),
        None if divergence is None else _compared(other, head, temperature, math.run(divergence)),
        (lambda values: loss(named(values))) if loss and known else None,
    )
    bias = None if head.bias is None else head.bias[:vocab]
    chosen = head.renamed(ids)
    found = ChosenTokens.apply(hidden, head.weight[:vocab], bias, chosen, work)  # type: ignore[no-untyped-call]
    return named(Values(*found))


def _named(values: Values, head: Head | None) -> TokenScores:
    """Return values as scores; ``head`` renames the most likely tokens, None leaves them out."""
    other = None
    if values.their_logprobs is not None:
        other = TokenScores(values.their_logprobs, values.their_entropy, values.their_best)
    best = None if head is None else head.renamed(values.best)
    return TokenScores(
        values.logprobs,
        values.entropy,
        best,
        values.asked,
        values.divergence,
        values.tail,
        other=other,
    )


def _compared(
    other: Other | None, head: Head, temperature: float, divergence: Divergence | None
) -> Compared | None:
    """Return the other model as a function of rows, and the divergence as one of logits."""
    if other is None or divergence is None:
        return None
    device = other.hidden.device.type
    # The backward pass runs outside this context, where a GPU's default is float16.
    autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def theirs(rows: slice) -> Tensor:
        with torch.no_grad(), torch.autocast(device, dtype, autocast):
            logits = other.head.logits(other.hidden[rows])
        return logits if temperature == 1.0 else logits.div_(temperature)

    def gap(logits: Tensor, theirs: Tensor) -> Tensor:
        ours, width = head.order(logits), theirs.shape[-1]
        # torch.compile warns about a slice that keeps everything.
        return divergence(ours if ours.shape[-1] == width else ours[:, :width], theirs)

    return Compared(theirs, gap, other.scored)


def auto_chunk_size(vocab_size: int, device: str = "cpu") -> int:
    """Return how many rows of logits a chunk has, at least 1.

    A chunk has 64 MiB of float32 logits and at most 1024 rows; on CUDA it has 1 GiB.

    >>> auto_chunk_size(151_936), auto_chunk_size(19), auto_chunk_size(151_936, "cuda")
    (110, 1024, 1766)
    """
    if device == "cuda":
        return max(1, CUDA_CHUNK_BYTES // (4 * vocab_size))
    return max(1, min(CHUNK_BYTES // (4 * vocab_size), MAX_CHUNK))


def pays_ahead(hidden: Tensor, head: Head, chunk_size: int | None) -> bool:
    """Return whether ``token_scores`` is faster for these ``[N, H]`` states if it gets the loss.

    If not, recomputing a chunk's logits is faster than calling the loss once more.
    """
    vocab, device = head.vocab_size or head.weight.shape[0], hidden.device.type
    rows = min(len(hidden), chunk_size or auto_chunk_size(vocab, device))
    return 2.0 * rows * vocab * hidden.shape[1] >= PAYS_FROM.get(device, PAYS_FROM["cuda"])
