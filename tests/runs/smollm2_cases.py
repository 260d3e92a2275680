"""Real vLLM on SmolLM2: ``test_smollm2`` runs these cases in a separate process."""

from __future__ import annotations

import os

import torch

from helpers.with_vllm.models import worst_gap
from kdrl_lightning.engines import Sampling, VLLMEngine
from kdrl_lightning.models.loading import load_causal_lm, load_tokenizer
from kdrl_lightning.models.weights import ModelWeights


def test_it_samples_from_the_weights_that_were_pushed() -> None:
    path = os.environ["SMOLLM2"]
    model, tokenizer = load_causal_lm(path), load_tokenizer(path)
    messages = [[{"role": "user", "content": f"Name {what}."}] for what in ("a river", "two fish")]
    prompts = [
        tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=True)["input_ids"]
        for m in messages
    ]
    engine = VLLMEngine(kv_cache_memory_bytes=64 << 20, max_model_len=128)
    weights = ModelWeights(model, path)
    engine.setup(weights, tokenizer.eos_token_id, tokenizer.pad_token_id)
    engine.update_weights(weights, 0)
    first = engine.generate(prompts, [[0, 1], [2, 3]], Sampling(12))
    assert worst_gap(model, prompts, first) < 1e-3  # float32, 30 layers, two implementations
    with torch.no_grad():  # as an update would
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.9)
    assert worst_gap(model, prompts, first) > 1e-2
    engine.update_weights(weights, 1)
    second = engine.generate(prompts, [[0, 1], [2, 3]], Sampling(12))
    assert worst_gap(model, prompts, second) < 1e-3
