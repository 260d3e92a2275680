"""Reduce per-token losses to one number, with denominators of the whole optimizer step.

Each function returns what one micro-batch adds to the step's loss. Summed over all micro-batches
and ranks, this is the same loss however the step is split. A micro-batch without loss tokens gives
a zero that still has a graph.
"""

from __future__ import annotations

from torch import Tensor


def token_mean(per_token: Tensor, mask: Tensor, num_loss_tokens: float | Tensor) -> Tensor:
    """Return the sum over the tokens in ``mask``, divided by the step's number of loss tokens.

    DAPO (arXiv 2503.14476, Eq. 8): every token of the step has the same weight.

    Args:
        per_token: ``[B, T]`` loss values.
        mask: ``[B, T]``, nonzero for the tokens that count.
        num_loss_tokens: loss tokens of the whole step, over all micro-batches and ranks.

    Returns:
        Scalar: what this batch adds to the step's mean; 0 for a step without loss tokens.
    """
    return _masked(per_token, mask).sum() / _at_least_one(num_loss_tokens)


def sequence_mean(per_token: Tensor, mask: Tensor, num_completions: float | Tensor) -> Tensor:
    """Return the mean over each completion's tokens, then over the step's completions.

    GRPO (arXiv 2402.03300, Eq. 3): every completion has the same weight, whatever its length.

    Args:
        per_token: ``[B, T]`` loss values.
        mask: ``[B, T]``, nonzero for the tokens that count.
        num_completions: completions with at least one loss token in the whole step.

    Returns:
        Scalar: what this batch adds to the step's mean; 0 for a step without loss tokens.
    """
    lengths = (mask != 0).sum(1).clamp(min=1)
    return (_masked(per_token, mask).sum(1) / lengths).sum() / _at_least_one(num_completions)


def constant_length(
    per_token: Tensor, mask: Tensor, num_completions: float | Tensor, length: int
) -> Tensor:
    """Return the mean over completions of their token sums divided by a constant length.

    Dr.GRPO (arXiv 2503.20783): the loss prefers neither short nor long completions.

    Args:
        per_token: ``[B, T]`` loss values.
        mask: ``[B, T]``, nonzero for the tokens that count.
        num_completions: completions with at least one loss token in the whole step.
        length: the constant, usually the token limit of a completion.

    Returns:
        Scalar: what this batch adds to the step's mean; 0 for a step without loss tokens.
    """
    return _masked(per_token, mask).sum() / (_at_least_one(num_completions) * length)


def group_token_mean(
    per_token: Tensor, mask: Tensor, group_tokens: Tensor, num_prompts: float | Tensor
) -> Tensor:
    """Return the mean over the tokens of a prompt's group, then over the step's prompts.

    KDRL (arXiv 2506.02208, Eq. 8) uses this mean: ``sum_i sum_t l / sum_i |o_i|`` within a group.

    Args:
        per_token: ``[B, T]`` loss values.
        mask: ``[B, T]``, nonzero for the tokens that count.
        group_tokens: ``[B]`` loss tokens of the completion's whole group.
        num_prompts: prompts with at least one loss token in the whole step.

    Returns:
        Scalar: what this batch adds to the step's mean; 0 for a step without loss tokens.
    """
    per_group = _masked(per_token, mask).sum(1) / group_tokens.clamp(min=1)
    return per_group.sum() / _at_least_one(num_prompts)


def _masked(per_token: Tensor, mask: Tensor) -> Tensor:
    # Multiplying by the mask would turn masked inf and NaN values into NaN.
    return per_token.masked_fill(mask == 0, 0.0)


def _at_least_one(count: float | Tensor) -> float | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
