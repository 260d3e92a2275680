"""Starts runs whose results several tests read: one process, and two under each strategy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PhiConfig, PhiForCausalLM

from helpers.processes.ready import run_ranks
from kdrl_lightning.tiny.models import make_tokenizer

ROOT = Path(__file__).parents[3]
CASES = (
    *("kdrl", "rlad", "gkd", "kdrl32", "sick", "routed", "mixed", "family", "prompted"),
    *("lora", "lora_resumed", "average"),
)
OWN = {
    "auto": (),
    "ddp": ("stale", "failing"),
    "fsdp2": ("bf16", "lora_bf16", "half", "stale", "choosy", "average_resumed"),
}


def save_phi(folder: Path, seed: int) -> None:
    """Save a Phi, whose LayerNorm keeps float64 (RMSNorm would not), and whose head has a bias."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=49,  # odd: the ranks hold parts of different sizes
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    PhiForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Runs:
    """Starts the driver once per strategy, and reads what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with FileLock(f"{folder}.lock"):  # workers of a parallel session share the runs
            for seed, name in enumerate(("student", "teacher", "other")):
                if not (folder / name / "tokenizer.json").exists():
                    save_phi(folder / name, seed)

    def start(self, strategy: str, cases: tuple[str, ...]) -> None:
        """Run cases, all in one start of the processes."""
        script = str(ROOT / "tests/helpers/processes/strategy_driver.py")
        arguments = [str(self.folder), strategy, *cases]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        run_ranks(script, [arguments] * (1 if strategy == "auto" else 2), env)

    def __call__(self, strategy: str, case: str) -> dict[str, Any]:
        """Return what the run of a case has recorded."""
        file = self.folder / strategy / f"{case}.pt"
        with FileLock(self.folder / f"{strategy}.lock"):
            if not file.exists():
                self.start(strategy, CASES + OWN[strategy])
        seen: dict[str, Any] = torch.load(file, weights_only=True)
        return seen
