"""Losses as pure functions of tensors: per-token values out, the caller reduces."""

from kdrl_lightning.losses.divergences import forward_kl, k1, k2, k3, reverse_kl
from kdrl_lightning.losses.logprobs import chosen_logprobs
from kdrl_lightning.losses.policy import (
    clipped_surrogate,
    trrd_log_ratio,
    trrd_surrogate,
)
from kdrl_lightning.losses.reduction import (
    constant_length,
    group_token_mean,
    sequence_mean,
    token_mean,
)

__all__ = [
    "chosen_logprobs",
    "clipped_surrogate",
    "constant_length",
    "forward_kl",
    "group_token_mean",
    "k1",
    "k2",
    "k3",
    "reverse_kl",
    "sequence_mean",
    "token_mean",
    "trrd_log_ratio",
    "trrd_surrogate",
]
