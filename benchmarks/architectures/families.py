"""Builds small random models of every causal language model type of transformers.

One table of sizes fits all types: a size is set if the type's configuration has a field of that
name. ``SPECIAL`` has what a type needs beyond that; ``LEFT_OUT`` says for which types no small
model is built, and why.

Configurations, models and tokenizers are ``Any``: transformers has no types that all share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WIDTH, HEADS, LAYERS, VOCAB, POSITIONS = 64, 4, 4, 256, 256
WINDOW = 8  # of sliding windows and chunks: short, so that tests exceed it

SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"], WIDTH),
    **dict.fromkeys(["lru_width", "word_embed_proj_dim"], WIDTH),
    **dict.fromkeys(["input_embedding_size", "output_embedding_size", "embedding_dim"], WIDTH),
    **dict.fromkeys(["backbone_hidden_size", "router_hidden_size", "pronunciation_embed_dim"], 32),
    **dict.fromkeys(["shape_embed_dim", "linear_head_dim", "dim_model_base"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], LAYERS),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_decoder_layers", "num_blocks", "depth"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], HEADS),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], HEADS),
    **dict.fromkeys(["attention_heads", "swa_num_attention_heads", "index_n_heads"], HEADS),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["linear_num_key_heads", "num_query_groups"], 2),
    **dict.fromkeys(["head_dim", "swa_head_dim", "dim_head", "kv_channels", "d_head"], 16),
    **dict.fromkeys(["attention_head_size", "linear_key_head_dim", "linear_value_head_dim"], 16),
    **dict.fromkeys(["v_head_dim", "qk_nope_head_dim", "global_head_dim", "index_head_dim"], 16),
    **dict.fromkeys(["query_pre_attn_scalar", "rotary_dim"], 16),
    "qk_rope_head_dim": 8,
    **dict.fromkeys(["intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"], 96),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "dff", "d_inner"], 96),
    **dict.fromkeys(["intermediate_size_mlp", "feed_forward_size", "dense_intermediate_size"], 96),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank"], 16),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts"], 4),
    "moe_num_experts": 4,
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    "zero_expert_num": 2,
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "first_k_dense_replace"], 1),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["num_dense_layers", "moe_layer_start_index"], 1),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], POSITIONS),
    **dict.fromkeys(["context_length", "model_max_length", "max_target_positions"], POSITIONS),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "window_size"], WINDOW),
    **dict.fromkeys(["attention_window_size", "local_attention", "attention_chunk_size"], WINDOW),
    **dict.fromkeys(["index_topk", "keep_window_size"], WINDOW),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], WINDOW),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], HEADS),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 32),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank", "laurel_rank", "adapter_rank"], 8),
    "mamba_d_ssm": 128,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}

ALTERNATE = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
SPARSE = ["dense", "sparse", "sparse", "sparse"]

TWO_ROPES = {
    kind: {"rope_type": "default", "rope_theta": 10000.0}
    for kind in ("full_attention", "sliding_attention")
}
GEMMA_4 = {"layer_types": ALTERNATE, "num_kv_shared_layers": 0}
QWEN_4 = {
    "output_gate_type": "sigmoid",
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ALTERNATE,
        "rope_parameters": {k: {**v, "mrope_section": [3, 3, 2]} for k, v in TWO_ROPES.items()},
    },
    "cwm": {"bos_token_id": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    "gemma3": {"text_config": {"layer_types": ALTERNATE}},
    "gemma3_text": {"layer_types": ALTERNATE},
    "gemma3n_text": {"layer_types": ALTERNATE},
    "gemma4": {"text_config": GEMMA_4},
    "gemma4_text": GEMMA_4,
    "gemma4_unified": {"text_config": GEMMA_4},
    "gemma4_unified_text": GEMMA_4,
    "got_ocr2": {"text_config": {"model_type": "qwen2"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gpt_bigcode": {"num_key_value_heads": 1},  # it always has one
    "granitemoehybrid": {"layer_types": LINEAR},
    "hrm_text": {"initializer_range": 0.05},  # its cycles amplify rounding errors
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": LINEAR},
    "laguna": {"layer_types": ALTERNATE},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "mellum": {"layer_types": ALTERNATE},
    "mllama": {"text_config": {"cross_attention_layers": [1], "bos_token_id": 2}},
    "emu3": {"text_config": {"bos_token_id": 2}},
    "modernbert-decoder": {"bos_token_id": 2},
    "longcat_flash": {"head_dim": 8},
    "qwen4_exp": {"text_config": QWEN_4},
    "qwen4_exp_text": QWEN_4,
    "rwkv": {"attention_hidden_size": WIDTH},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}

LEFT_OUT: dict[str, str] = {
    "blt": "reads bytes in patches of several models",
    "gemma3n": "its image encoder needs timm; its text model is gemma3n_text",
    "gemma4_assistant": "drafts tokens for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts tokens for another model, whose states it reads",
    "musicgen": "decodes sound from a text encoder's states",
    "musicgen_melody": "decodes sound from a text encoder's states",
}


def families() -> list[str]:
    """Return the model types of the table."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(LEFT_OUT))


def small_config(model_type: str, **settings: Any) -> Any:
    """Return a small configuration of a type; ``settings`` change it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**merged(merged(_sizes(kind), SPECIAL.get(model_type, {})), settings))


def _sizes(kind: Any) -> dict[str, Any]:
    known = kind().to_dict()
    chosen = {name: size for name, size in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:  # the configuration derives `head_dim`
        chosen.pop("head_dim", None)
        chosen["num_key_value_heads"] = HEADS
    for name, sub in getattr(kind, "sub_configs", {}).items():
        if isinstance(known.get(name), dict):
            if sub.__name__ == "AutoConfig":
                sub = type(getattr(kind(), name))
            chosen[name] = _sizes(sub)
    return chosen


def merged(sizes: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """Return ``sizes`` updated by ``special``, also inside nested configurations."""
    deep = {k: merged(sizes.get(k, {}), v) for k, v in special.items() if k.endswith("_config")}
    return {**sizes, **special, **deep}


def build(model_type: str, seed: int = 0, **settings: Any) -> Any:
    """Return a random float32 model in evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = small_config(model_type, **settings)
    return AutoModelForCausalLM.from_config(config).float().eval()


def save(model_type: str, folder: str | Path, seed: int = 0, **settings: Any) -> str:
    """Write a random model and a tokenizer of single characters into a folder; return its path."""
    build(model_type, seed, **settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_tokenizer() -> Any:
    """Return a tokenizer with a token per printable character, a padding and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<eos>", *map(chr, range(32, 127))]
    plain = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
