"""Random models whose folder, configuration or weights differ from those of plain decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Mamba2Config,
    PegasusConfig,
    Qwen3Config,
    WhisperConfig,
)
from transformers.models.pegasus.modeling_pegasus import PegasusForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperForCausalLM

from kdrl_lightning.tiny.models import make_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "head_dim": 32,
}


def save(model: Any, folder: Path, **generation: Any) -> str:
    """Write a model, a tokenizer, and further settings of the generation configuration."""
    tokenizer = make_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | generation))
    return str(folder)


def ends() -> dict[str, int]:
    tokenizer = make_tokenizer()
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def plain(folder: Path, **generation: Any) -> str:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, **ends())
    return save(AutoModelForCausalLM.from_config(config), folder, **generation)


def with_images(folder: Path) -> str:
    """Gemma 3: the text's configuration lies inside, and text never reaches the vision tower."""
    torch.manual_seed(0)
    text = Gemma3TextConfig(**SIZES, **ends(), layer_types=["sliding_attention", "full_attention"])
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, **ends()
    )
    return save(Gemma3ForConditionalGeneration(config), folder)


def state_space(folder: Path) -> str:
    """Mamba 2: its configuration holds an infinity."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=16,
        state_size=8,
        n_groups=1,
        **ends(),
    )
    return save(AutoModelForCausalLM.from_config(config), folder)


def with_sines(folder: Path) -> str:
    """Pegasus' decoder: its table of positions is a parameter without gradient."""
    torch.manual_seed(0)
    config = PegasusConfig(
        vocab_size=32,
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_position_embeddings=96,
        is_decoder=True,
        is_encoder_decoder=False,
        **ends(),
    )
    return save(PegasusForCausalLM(config), folder)


def with_cross_attention(folder: Path) -> str:
    """Whisper's decoder: its layers attend to sound, which text has none of."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=32,
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_target_positions=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
    )
    return save(WhisperForCausalLM(config), folder)
