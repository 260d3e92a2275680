"""Losses as pure functions of tensors. They return per-token values; the caller reduces them."""

from kdrl_lightning.losses.corrections import (
    importance_mask,
    importance_weights,
    sequence_sum,
)
from kdrl_lightning.losses.divergences import (
    clipped_forward_kl,
    forward_kl,
    generalized_jsd,
    k1,
    k2,
    k3,
    policy_gradient_kl,
    reverse_kl,
    with_tail,
)
from kdrl_lightning.losses.logprobs import TokenScores, chosen_logprobs, token_scores
from kdrl_lightning.losses.ratios import (
    cispo_surrogate,
    clipped_surrogate,
    luffy_surrogate,
    sequence_log_ratio,
    sequence_surrogate,
    trrd_log_ratio,
    trrd_surrogate,
)
from kdrl_lightning.losses.reduction import (
    constant_length,
    group_token_mean,
    sequence_mean,
    token_mean,
)
from kdrl_lightning.losses.selection import (
    aligned,
    beneficial,
    certain,
    wrong_completions,
    wrong_groups,
)
from kdrl_lightning.losses.weights import capped_ratio, confidence, gate, shares

__all__ = [
    "TokenScores",
    "aligned",
    "beneficial",
    "capped_ratio",
    "certain",
    "chosen_logprobs",
    "cispo_surrogate",
    "clipped_forward_kl",
    "clipped_surrogate",
    "confidence",
    "constant_length",
    "forward_kl",
    "gate",
    "generalized_jsd",
    "group_token_mean",
    "importance_mask",
    "importance_weights",
    "k1",
    "k2",
    "k3",
    "luffy_surrogate",
    "policy_gradient_kl",
    "reverse_kl",
    "sequence_log_ratio",
    "sequence_mean",
    "sequence_sum",
    "sequence_surrogate",
    "shares",
    "token_mean",
    "token_scores",
    "trrd_log_ratio",
    "trrd_surrogate",
    "with_tail",
    "wrong_completions",
    "wrong_groups",
]
