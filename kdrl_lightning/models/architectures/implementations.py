"""Replaces implementations of attention and experts that transformers chooses wrongly."""

from __future__ import annotations

import torch

from kdrl_lightning.common.untyped import HFModel


def keep_soft_caps(model: HFModel) -> bool:
    """Switch a model with soft-capped attention scores (Gemma 2) to eager attention.

    transformers' ``sdpa`` leaves out the cap, which is visible only if scores are large.

    Returns:
        Whether the implementation changed.
    """
    config = model.config.get_text_config(decoder=True)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if not capped or config._attn_implementation != "sdpa":
        return False
    model.set_attn_implementation("eager")
    return True


def keep_precision(model: HFModel) -> bool:
    """Let a float64 model run its experts one by one: grouped products do not take float64.

    Returns:
        Whether the implementation changed.
    """
    if model.dtype != torch.float64 or model.config._experts_implementation != "grouped_mm":
        return False
    model.set_experts_implementation("eager")
    return True
