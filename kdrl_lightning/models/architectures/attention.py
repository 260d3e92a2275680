"""Soft caps of attention scores, which transformers' fast attention leaves out."""

from __future__ import annotations

from kdrl_lightning.common.untyped import HFModel


def keep_soft_caps(model: HFModel) -> bool:
    """Switch a model with soft-capped attention scores (Gemma 2) to eager attention.

    transformers' ``sdpa`` leaves out the cap, which shows only if scores are large.

    Returns:
        Whether the implementation changed.
    """
    config = model.config.get_text_config(decoder=True)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if not capped or config._attn_implementation != "sdpa":
        return False
    model.set_attn_implementation("eager")
    return True
