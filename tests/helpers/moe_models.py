"""Small random mixtures of experts, and models with parts that text never trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

BASE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
ATTENTION = ["linear_attention", "full_attention"]
TEXT = {**BASE, "head_dim": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**TEXT, **EXPERTS, "num_experts": 4},
    "glm4_moe": {**TEXT, **EXPERTS, **SHARED},
    "deepseek_v3": {
        **BASE,
        **EXPERTS,
        **SHARED,
        **LATENT,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
        "v_head_dim": 8,
    },
    "qwen3_next": {
        **TEXT,
        **EXPERTS,
        **LINEAR,
        "num_experts": 4,
        "shared_expert_intermediate_size": 12,
        "layer_types": ATTENTION,
    },
    "mixtral": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **TEXT,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "lfm2_moe": {
        **BASE,
        **EXPERTS,
        "num_experts": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "jamba": {
        **BASE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
    },
    "phimoe": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3": {
        "text_config": {**TEXT, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_id": 3,
        "boi_token_id": 4,
        "eoi_token_id": 5,
    },
    "mamba": {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "dbrx": {
        "vocab_size": 32,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 1,
        "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return a random model whose weights are large enough for experts to differ."""
    config = AutoConfig.for_model(name, **MODELS[name])
    torch.manual_seed(0)
    # torch's grouped matrix products exist in float32 and below only.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **experts)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def save(name: str, folder: Path, tokenizer: str) -> str:
    """Write such a model, with the tokenizer of another folder."""
    build(name, torch.float32).save_pretrained(folder)
    for file in Path(tokenizer).glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    return str(folder)


@torch.no_grad()
def logprobs(model: Any, ids: Tensor) -> Tensor:
    """Return log-probs of the whole vocabulary at each position of rows of ids."""
    out: Tensor = model(input_ids=ids).logits.log_softmax(-1)
    return out
