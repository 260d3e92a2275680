"""Small models that scale, cap or shift their logits in each known way, rows, and slow scores."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from kdrl_lightning.rollout_batch import RolloutBatch, collate

VOCAB, PAD = 40, 0
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    # Large logits, so that a forgotten soft-cap or scale changes the numbers.
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": 1,
}
HEAD_16 = {"head_dim": 16}
GEMMA = {**HEAD_16, "query_pre_attn_scalar": 16, "sliding_window": 4}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", HEAD_16),
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "Gemma2ForCausalLM": ("Gemma2Config", {**GEMMA, "final_logit_softcapping": 2.0}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GEMMA),
    "GraniteForCausalLM": ("GraniteConfig", {"logits_scaling": 3.0}),
    "CohereForCausalLM": ("CohereConfig", {"logit_scale": 0.25}),
    # The one with a bias on its head.
    "PhiForCausalLM": ("PhiConfig", {}),
}


def build(name: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    config, own = ARCHITECTURES[name]
    torch.manual_seed(0)
    settings = {**COMMON, **own, "tie_word_embeddings": tied}
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model.to(dtype)


def rollout(temperature: float = 1.0) -> RolloutBatch:
    """Return rows of different prompt, completion and total lengths."""
    generator = torch.Generator().manual_seed(3)
    shape = [(5, 3), (1, 9), (7, 1), (2, 2)]
    draw = [torch.randint(2, VOCAB, (p + c,), generator=generator).tolist() for p, c in shape]
    return collate(
        [row[:p] for row, (p, _) in zip(draw, shape, strict=True)],
        [row[p:] for row, (p, _) in zip(draw, shape, strict=True)],
        [0, 0, 1, 1],
        pad_id=PAD,
    ).replace(temperature=temperature)


def reference(
    model: Any, batch: RolloutBatch, vocab_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities from the model's own logits, a row and a token at a time."""
    logprobs = [[torch.zeros(())] * batch.completion_ids.shape[1] for _ in range(len(batch))]
    entropy = [list(row) for row in logprobs]
    for b in range(len(batch)):
        prompt, length = int(batch.prompt_lengths[b]), int(batch.lengths[b])
        logits = model(input_ids=batch.input_ids[b : b + 1, :length], use_cache=False).logits[0]
        for t in range(length - prompt):
            row = logits[prompt - 1 + t, :vocab_size] / batch.temperature
            shares = row.log_softmax(-1)
            logprobs[b][t] = shares[batch.input_ids[b, prompt + t]]
            entropy[b][t] = -(shares.exp() * shares).sum()
    return tuple(torch.stack([torch.stack(row) for row in t]) for t in (logprobs, entropy))
