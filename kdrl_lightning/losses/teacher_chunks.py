"""Chunks: runs of tokens that a teacher with another tokenizer scores together.

``places [B, T]`` holds each token's index within its chunk: 0 begins a chunk, and -1 marks a token
without a score, which is a chunk by itself. If ``places`` is None, each token is a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_totals(values: Tensor, places: Tensor | None) -> Tensor:
    """Return the sum over each chunk, repeated at each of its tokens.

    Args:
        values: ``[B, T]``.
        places: ``[B, T]`` int64; None returns ``values``.

    >>> chunk_totals(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 1, 0]]))
    tensor([[3., 3., 4.]])
    """
    if places is None:
        return values
    # We number chunks over all rows, because a sum in one dimension can be deterministic on a GPU.
    numbers = (places <= 0).flatten().cumsum(0) - 1
    totals = values.new_zeros(values.numel()).index_add(0, numbers, values.flatten())
    return totals[numbers].view_as(values)


def chunk_sizes(places: Tensor) -> Tensor:
    """Return ``[B, T]`` int64: how many tokens each token's chunk has."""
    return chunk_totals(torch.ones_like(places), places)


def teacher_beside(teacher_logprobs: Tensor, logprobs: Tensor, places: Tensor | None) -> Tensor:
    """Return per-token teacher log-probabilities whose gap to the student's is the chunk's gap.

    A chunk is one action: with ``Delta = sum log pi_T - sum log pi`` over the chunk, the result is
    ``log pi + Delta`` at each token, computed as ``sum log pi_T - (the chunk's other log pi)``.

    Args:
        teacher_logprobs: ``[B, T]``, the chunk's sum at each of its tokens.
        logprobs: ``[B, T]``, the student's, with which you will compare the result; this function
            detaches them.
        places: ``[B, T]`` int64; None returns ``teacher_logprobs``.

    Returns:
        ``[B, T]`` nats; in a chunk of one token exactly the teacher's.

    >>> student = torch.tensor([[-1.0, -2.0, -4.0]])
    >>> teacher = torch.tensor([[-5.0, -5.0, -1.0]])
    >>> teacher_beside(teacher, student, torch.tensor([[0, 1, 0]])) - student
    tensor([[-2., -2.,  3.]])
    """
    if places is None:
        return teacher_logprobs
    student = logprobs.detach()
    return teacher_logprobs - (chunk_totals(student, places) - student)


def chunk_share(values: Tensor, places: Tensor | None) -> Tensor:
    """Divide each chunk's value by the chunk's number of tokens, but not its gradient.

    A loss that is repeated at each token of a chunk then counts once in a sum, while each token
    gets the full gradient.

    Args:
        values: ``[B, T]``, equal within a chunk.
        places: ``[B, T]`` int64; None returns ``values``.
    """
    if places is None:
        return values
    share = 1.0 / chunk_sizes(places).to(values.dtype)
    return values.detach() * share + (values - values.detach())


def whole_chunks(mask: Tensor, places: Tensor | None) -> Tensor:
    """Return the mask without tokens that have no score and without chunks it covers only partly.

    Args:
        mask: ``[B, T]`` bool.
        places: ``[B, T]`` int64; None returns ``mask``.

    >>> mask = torch.tensor([[True, True, True, False, True]])
    >>> whole_chunks(mask, torch.tensor([[0, 1, 0, 1, -1]]))
    tensor([[ True,  True, False, False, False]])
    """
    if places is None:
        return mask
    return (chunk_totals((~mask).long(), places) == 0) & (places >= 0)
