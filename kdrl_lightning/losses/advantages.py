"""Rewards to advantages, pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rollout_batch import flat_groups


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
    constant = _flat(rewards)
    return advantages.masked_fill(constant, 0.0)


def shaped(
    rewards: Tensor,
    mean_gaps: Tensor,
    teacher_kl_coef: float,
    scale_by_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Group-relative advantages of rewards shaped by the teacher: ``r' = r + beta mean_t d``.

    KDRL (arXiv 2506.02208) compares the joint loss with a reward shaping whose exact form was not
    recovered; this one is our choice. The standard deviation is that of the **unshaped** rewards:
    that of the shaped ones would cancel beta in a group of equal rewards and train it on KL noise
    at full size. Where it is 0, the shaped reward's own difference from the group's mean stands.

    Args:
        rewards: ``[P, G]`` finite rewards, G >= 2.
        mean_gaps: ``[P, G]`` mean over a completion's tokens of log pi_T - log pi_old.
        teacher_kl_coef: beta.
        scale_by_std: divide by the group's standard deviation of ``rewards``.
        eps: added to the standard deviation.

    Returns:
        ``[P, G]`` advantages.
    """
    plain = group_relative(rewards, scale_by_std=False)  # checks shape and values as well
    gaps = mean_gaps - mean_gaps.mean(1, keepdim=True)
    advantages = plain + teacher_kl_coef * gaps
    if not scale_by_std or not rewards.shape[0]:
        return advantages
    constant = _flat(rewards)
    std = rewards.to(plain.dtype).std(1, keepdim=True) + eps
    return advantages / torch.where(constant, 1.0, std)


def _flat(rewards: Tensor) -> Tensor:
    """``[P, 1]`` bool: groups of equal rewards."""
    rows = torch.arange(len(rewards), device=rewards.device)
    return flat_groups(rewards.flatten(), rows.repeat_interleave(rewards.shape[1]))[:, None]


def reweighted(advantages: Tensor, gap: Tensor, mix: float = 0.5, width: float = 0.2) -> Tensor:
    """Self-distilled reweighting: the teacher scales an advantage, never flips it.

    RLSD (arXiv 2604.03128), with lambda = mix and eps_w = width:
    ``A ((1 - mix) + mix clip(e^(sign(A) d), 1 - width, 1 + width))``.

    Args:
        advantages: ``[B, T]`` or broadcastable to it.
        gap: ``[B, T]`` d = log pi_T - log pi.
        mix: in [0, 1]; 0 leaves the advantage alone.
        width: in [0, 1].

    Returns:
        ``[B, T]``.
    """
    tilt = torch.where(advantages == 0, 0.0, advantages.sign() * gap)  # not 0 * inf
    weight = tilt.exp().clamp(1.0 - width, 1.0 + width)
    return advantages * (1.0 - mix + mix * weight)
