"""Tools for checks: the device, a folder, timers, and random models written on first use."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdrl_lightning.models.loading import load_causal_lm

# `Any`: models of transformers share no typed base.


@dataclass(frozen=True)
class Shape:
    """Shape of a Qwen3 model with tied embeddings.

    Attributes:
        width: hidden size.
        layers: number of transformer layers.
        heads: number of query heads; every two of them share one key-value head.
        head_dim: width of a head.
        mlp: width of the feed-forward layer.
        vocab: number of rows of the embedding.
        window: tokens of the sliding window in every layer; None for full attention.
    """

    width: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int
    window: int | None = None


# Qwen3-0.6B, its first four layers, and these with a sliding window; small models for a CPU.
ON_GPU = {
    "model": Shape(1024, 28, 16, 128, 3072, 151_936),
    "few-layers": Shape(1024, 4, 16, 128, 3072, 151_936),
    "window": Shape(1024, 4, 16, 128, 3072, 151_936, window=64),
}
ON_CPU = {
    "model": Shape(64, 2, 2, 32, 128, 512),
    "few-layers": Shape(64, 2, 2, 32, 128, 512),
    "window": Shape(64, 2, 2, 32, 128, 512, window=64),
}
CHARACTERS = "0123456789+=,#"


@dataclass(frozen=True)
class Bench:
    """The machine to check.

    Attributes:
        folder: folder for files that all checks share.
        device: device on which models run.
        gpus: number of GPUs.
    """

    folder: Path
    device: torch.device
    gpus: int

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Type that models compute in: bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def shape(self, name: str) -> Shape:
        """Return the shape of the model ``model``, ``few-layers`` or ``window``."""
        return (ON_GPU if self.on_gpu else ON_CPU)[name]

    def path(self, name: str) -> str:
        """Return the folder of a model with random weights; write it on first use."""
        folder = self.folder / name
        if not (folder / "config.json").exists():
            write_model(self.shape(name), folder, self.dtype)
        return str(folder)

    def load(self, name: str, dtype: torch.dtype | None = None) -> Any:  # a transformers model
        """Return a model on the device; see ``shape`` for its name."""
        with torch.device("cpu"):
            model = load_causal_lm(self.path(name), dtype or self.dtype)
        return model.to(self.device)

    def wait(self) -> None:
        """Wait until the GPU has finished its queued work."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        """Return the median seconds that ``work`` takes, after one warm-up run."""
        times = []
        for _ in range(repeats + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def peak(self, work: Callable[[], object]) -> int | None:
        """Return the peak of the bytes that ``work`` allocates; None on a CPU."""
        if not self.on_gpu:
            work()
            return None
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


def write_model(shape: Shape, folder: Path, dtype: torch.dtype) -> None:
    """Write a model with random weights and a made-up tokenizer as a Hugging Face folder."""
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    names = ["<pad>", "<eos>", *CHARACTERS]
    names += [f"t{i}" for i in range(len(names), shape.vocab)]
    make: Any = Qwen2Tokenizer  # its type hints forbid `unk_token=None`
    tokenizer = make(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token=None,
    )
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 2),
        head_dim=shape.head_dim,
        max_position_embeddings=40_960,
        initializer_range=2 / shape.width**0.5,  # logits with a standard deviation of about 2
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        use_sliding_window=shape.window is not None,
        sliding_window=shape.window,
        max_window_layers=0,
    )
    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(config)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
