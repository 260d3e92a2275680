"""Rewards to advantages, pure functions of tensors."""

from __future__ import annotations

from torch import Tensor

from kdrl_lightning.errors import ConfigurationError


def group_relative(rewards: Tensor, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Advantage of each completion within its group.

    DeepSeekMath (arXiv 2402.03300, GRPO); without the division: Dr.GRPO (arXiv 2503.20783).

    ``A_i = (r_i - mean(r)) / (std(r) + eps)``, std with ddof = 1. A group whose rewards are all
    equal gets exactly 0.

    Args:
        rewards: ``[P, G]`` finite rewards, one row per prompt, G >= 2.
        scale_by_std: divide by the group's standard deviation.
        eps: added to the standard deviation.

    Returns:
        ``[P, G]`` advantages; integer rewards give float32.

    Raises:
        ConfigurationError: shape is not ``[P, G]``, G = 1, or a reward is not finite.

    >>> import torch
    >>> group_relative(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), scale_by_std=False)
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    if rewards.dim() != 2:
        raise ConfigurationError(
            f"`rewards` must have shape [P, G]: got {list(rewards.shape)}. "
            "Give one row per prompt and one column per completion."
        )
    if rewards.shape[1] < 2:
        raise ConfigurationError(
            f"`group_size` must be at least 2 for a group-relative advantage: "
            f"got {rewards.shape[1]}. Sample more completions per prompt."
        )
    if not rewards.is_floating_point():
        rewards = rewards.float()
    if not rewards.isfinite().all():
        raise ConfigurationError(
            f"`rewards` must be finite: got {int((~rewards.isfinite()).sum())} NaN or infinite "
            f"of {rewards.numel()}. Mend the reward function."
        )
    if not rewards.shape[0]:
        return rewards.clone()
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + eps)
    # Equal rewards can leave a rounding residue of the mean, which the division would blow up.
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(constant, 0.0)
