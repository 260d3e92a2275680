"""Per-token losses to one number, with denominators that are global over the optimizer step.

Each function returns this batch's share: the shares of all micro-batches and ranks add up to the
step's loss, whatever the cut. A fully masked batch gives a zero that still carries a graph.
"""

from __future__ import annotations

from torch import Tensor


def token_mean(per_token: Tensor, mask: Tensor, num_loss_tokens: float | Tensor) -> Tensor:
    """Sum over the masked tokens, divided by the step's loss tokens.

    DAPO (arXiv 2503.14476, Eq. 8): every token of the step weighs the same.

    Args:
        per_token: ``[B, T]``.
        mask: ``[B, T]``, nonzero where the token counts.
        num_loss_tokens: loss tokens of the whole step, all micro-batches and ranks.

    Returns:
        Scalar share of the step's mean; 0 for a step without loss tokens.
    """
    return _masked(per_token, mask).sum() / _at_least_one(num_loss_tokens)


def sequence_mean(per_token: Tensor, mask: Tensor, num_completions: float | Tensor) -> Tensor:
    """Mean over each completion's tokens, then over the step's completions.

    GRPO (arXiv 2402.03300, Eq. 3): every completion weighs the same, whatever its length.

    Args:
        per_token: ``[B, T]``.
        mask: ``[B, T]``.
        num_completions: completions with at least one loss token in the whole step.
    """
    lengths = (mask != 0).sum(1).clamp(min=1)
    return (_masked(per_token, mask).sum(1) / lengths).sum() / _at_least_one(num_completions)


def constant_length(
    per_token: Tensor, mask: Tensor, num_completions: float | Tensor, length: int
) -> Tensor:
    """Sum over tokens divided by a constant length, mean over the step's completions.

    Dr.GRPO (arXiv 2503.20783): no preference for short or long completions.

    Args:
        per_token: ``[B, T]``.
        mask: ``[B, T]``.
        num_completions: completions with at least one loss token in the whole step.
        length: the constant, usually the token limit of a completion.
    """
    return _masked(per_token, mask).sum() / (_at_least_one(num_completions) * length)


def group_token_mean(
    per_token: Tensor, mask: Tensor, group_tokens: Tensor, num_prompts: float | Tensor
) -> Tensor:
    """Mean over the tokens of a prompt's group, then over the step's prompts.

    KDRL's own normalisation (arXiv 2506.02208): ``sum_i sum_t l / sum_i |o_i|`` within a group.

    Args:
        per_token: ``[B, T]``.
        mask: ``[B, T]``.
        group_tokens: ``[B]`` loss tokens of the completion's whole group.
        num_prompts: prompts with at least one loss token in the whole step.
    """
    per_group = _masked(per_token, mask).sum(1) / group_tokens.clamp(min=1)
    return per_group.sum() / _at_least_one(num_prompts)


def _masked(per_token: Tensor, mask: Tensor) -> Tensor:
    # Not a product: 0 * inf and 0 * nan would leak through it.
    return per_token.masked_fill(mask == 0, 0.0)


def _at_least_one(count: float | Tensor) -> float | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
