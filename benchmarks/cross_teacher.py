"""Trains the teacher of ``configs/recipes/smollm2_cross.yaml``, which has a different tokenizer.

The teacher is a small Llama, random at the start, whose byte-level tokenizer is trained here on the
task's texts and writes numbers of two digits as one token (SmolLM2 writes digits one by one). This
library trains it on solved problems. On a CPU:

    python benchmarks/cross_teacher.py --out runs/smollm2/cross_teacher
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch
from smollm2_teacher import SYSTEM, TASK, problems, warmed_up
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdrl_lightning import ReasoningGymPrompts
from kdrl_lightning.callbacks import CPUThreads
from kdrl_lightning.tiny.training import train_on_traces

SPECIAL = ["<pad>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(texts: list[str]) -> Any:
    """Return a byte-level BPE tokenizer trained on texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = [f" {n}" for n in range(200)] + [str(n) for n in range(200)]
    made.train_from_iterator([*texts, *numbers * 50], trainer)
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_untrained(folder: str, tokenizer: Any) -> None:
    """Write a random model with this tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(out: str, steps: int, batch_size: int, lr: float) -> None:
    """Train from random weights on the right answers, and export."""
    traces = problems(steps * batch_size)
    start = tempfile.mkdtemp()
    save_untrained(start, make_tokenizer([m["content"] for t in traces[:500] for m in t["prompt"]]))
    pl.seed_everything(0, verbose=False)
    train_on_traces(
        start,
        traces,
        out,
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
        rate=warmed_up(steps),
        steps=steps,
        batch_size=batch_size,
        name="teacher",
        callbacks=[CPUThreads(threads=1)],
    )


def accuracy(folder: str, count: int = 256) -> float:
    """Return how often the greedy answer to a held-out problem is right."""
    from kdrl_lightning.models.loading import load_causal_lm, load_tokenizer

    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    rows = ReasoningGymPrompts("chain_sum", count, 4, TASK, chat=True, system=SYSTEM)
    right = 0
    for row in rows:
        text = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=False
        )
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        right += (
            tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) == row["answer"]
        )
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the teacher")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    arguments = parser.parse_args()
    began = time.perf_counter()
    train(arguments.out, arguments.steps, arguments.batch_size, arguments.lr)
    print(f"teacher in {arguments.out}, made in {time.perf_counter() - began:.0f} s")
    print(f"greedy answers right: {accuracy(arguments.out):.3f}")


if __name__ == "__main__":
    main()
