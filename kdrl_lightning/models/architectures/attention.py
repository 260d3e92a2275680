"""Features of attention that a fast implementation leaves out."""

from __future__ import annotations

from typing import Any


def keep_soft_caps(model: Any) -> bool:
    """Take eager attention for a model whose attention scores are soft-capped (Gemma 2).

    transformers' ``sdpa`` leaves the cap out, which shows only where scores are large. Returns
    whether the implementation changed.
    """
    config = model.config.get_text_config(decoder=True)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if not capped or config._attn_implementation != "sdpa":
        return False
    model.set_attn_implementation("eager")
    return True
