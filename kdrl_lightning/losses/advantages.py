"""Turn rewards into advantages: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rollout_batch import flat_groups


def group_relative(rewards: Tensor, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Return the advantage of each completion within its group.

    DeepSeekMath (arXiv 2402.03300) introduces it with GRPO; Dr.GRPO (arXiv 2503.20783) omits the
    division.

    ``A_i = (r_i - mean(r)) / (std(r) + eps)``, std with ddof = 1. If all rewards of a group are
    equal, its advantages are exactly 0.

    Args:
        rewards: ``[P, G]`` finite rewards, one row per prompt, G >= 2.
        scale_by_std: divide by the group's standard deviation.
        eps: term added to the standard deviation.

    Returns:
        ``[P, G]`` advantages in the dtype of the rewards; float32 for integer rewards.

    Raises:
        ConfigurationError: the shape is not ``[P, G]``, G = 1, or a reward is not finite.

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
            f"of {rewards.numel()}. Correct the reward function."
        )
    if not rewards.shape[0]:
        return rewards.clone()
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + eps)
    # The mean of equal rewards can be off by a rounding error, which the division would enlarge.
    constant = _flat(rewards)
    return advantages.masked_fill(constant, 0.0)


def shaped(
    rewards: Tensor,
    mean_gaps: Tensor,
    teacher_kl_coef: float,
    scale_by_std: bool = True,
    eps: float = 1e-6,
    has_gap: Tensor | None = None,
) -> Tensor:
    """Return group-relative advantages of rewards shaped by the teacher: ``r' = r + beta mean d``.

    KDRL (arXiv 2506.02208) compares its joint loss with reward shaping; this form is our choice. We
    divide by the standard deviation of the **unshaped** rewards. Dividing by that of the shaped
    rewards would cancel beta in a group of equal rewards, and the group would train on KL noise at
    full size. If the standard deviation is 0, the advantage is the shaped reward minus the group's
    mean.

    Args:
        rewards: ``[P, G]`` finite rewards, G >= 2.
        mean_gaps: ``[P, G]`` mean over a completion's tokens of log pi_T - log pi_old, in nats.
        teacher_kl_coef: beta.
        scale_by_std: divide by the group's standard deviation of ``rewards``.
        eps: term added to the standard deviation.
        has_gap: ``[P, G]`` bool, False for completions that the teacher does not score because they
            have no context. They keep the plain advantage; the group's mean gap leaves them out.
            None: all have a gap.

    Returns:
        ``[P, G]`` advantages.

    Raises:
        ConfigurationError: the shape is not ``[P, G]``, G = 1, or a reward is not finite.
    """
    plain = group_relative(rewards, scale_by_std=False)  # checks shape and values as well
    gaps = mean_gaps - mean_gaps.mean(1, keepdim=True)
    if has_gap is not None:
        known = mean_gaps.masked_fill(~has_gap, 0.0)
        centre = known.sum(1, keepdim=True) / has_gap.sum(1, keepdim=True).clamp(min=1)
        gaps = (mean_gaps - centre).masked_fill(~has_gap, 0.0)
    advantages = plain + teacher_kl_coef * gaps
    if not scale_by_std or not rewards.shape[0]:
        return advantages
    constant = _flat(rewards)
    std = rewards.to(plain.dtype).std(1, keepdim=True) + eps
    return advantages / torch.where(constant, 1.0, std)


def extrapolated(
    gap: Tensor, teacher_logprobs: Tensor, ref_logprobs: Tensor, extrapolation: float = 1.25
) -> Tensor:
    """Return the teacher's gap, extrapolated away from a reference: G-OPD (arXiv 2602.12125).

    ``d + (lambda - 1) (log pi_T - log pi_ref)``. Used as the advantage of a policy gradient, it
    gives the gradient of reverse KL to the normalised ``pi_T^lambda pi_ref^(1 - lambda)``.

    Args:
        gap: ``[B, T]`` d = log pi_T - log pi, in nats.
        teacher_logprobs: ``[B, T]`` log pi_T.
        ref_logprobs: ``[B, T]`` log pi_ref.
        extrapolation: lambda: 1 is the teacher, 0 the reference, above 1 is ExOPD.

    Returns:
        ``[B, T]`` advantages, without gradient.

    >>> one = torch.tensor([[1.0]])
    >>> extrapolated(one, -one, -3.0 * one, extrapolation=1.5)
    tensor([[2.]])
    """
    return (gap + (extrapolation - 1.0) * (teacher_logprobs - ref_logprobs)).detach()


def _flat(rewards: Tensor) -> Tensor:
    """Return ``[P, 1]`` bool: True for groups of equal rewards."""
    rows = torch.arange(len(rewards), device=rewards.device)
    return flat_groups(rewards.flatten(), rows.repeat_interleave(rewards.shape[1]))[:, None]


def reweighted(advantages: Tensor, gap: Tensor, mix: float = 0.5, width: float = 0.2) -> Tensor:
    """Return advantages scaled by the teacher, which never changes their sign.

    RLSD (arXiv 2604.03128), with lambda = mix and eps_w = width:
    ``A ((1 - mix) + mix clip(e^(sign(A) d), 1 - width, 1 + width))``.

    Args:
        advantages: ``[B, T]`` or broadcastable to it.
        gap: ``[B, T]`` d = log pi_T - log pi, in nats.
        mix: weight of the scaled advantage, in [0, 1]; 0 returns the advantages unchanged.
        width: the scale stays in [1 - width, 1 + width]; in [0, 1].

    Returns:
        ``[B, T]`` advantages.
    """
    tilt = torch.where(advantages == 0, 0.0, advantages.sign() * gap)  # not 0 * inf
    weight = tilt.exp().clamp(1.0 - width, 1.0 + width)
    return advantages * (1.0 - mix + mix * weight)
